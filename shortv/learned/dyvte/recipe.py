"""What DyVTE's routers are (settings) and how they are trained (recipe)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shortv.learned.system import BatchSize, Rate, Steps, TrainingSeed
from shortv.spec import Count, Spec

MeanOver = Literal["after-image", "all-text"]
_MOST = 1 << 20
"""Largest width of a router: the paper's is 2048."""


class RouterSettings(Spec):
    """What routers read and how wide they are."""

    width: int = Field(default=2048, ge=1, le=_MOST, strict=True)
    mean_over: MeanOver = "after-image"
    """Which text states are averaged, the last one apart: those after the last image (released code), or all of the
    prompt's (paper)."""


class DyvteRecipe(Spec):
    """How routers are trained; the defaults are those of the paper (1 % of LLaVA's 665,000 samples) and its code."""

    width: int = Field(default=2048, ge=1, le=_MOST, description="Width of the routers.")
    mean_over: MeanOver = Field(
        default="after-image",
        description="Text that routers average: after the image (released code; text before an image cannot have read "
        "it), or all of the prompt (paper).",
    )
    steps: Steps = 416
    batch_size: BatchSize = 16
    learning_rate: Rate = 4e-5
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    rule: Literal["tokens", "exact"] = Field(
        default="tokens",
        description="An exit is safe if over 99 % of the answer's tokens stay and its cross-entropy stays below 1.03 "
        "times the full model's (released code; it also sees answers become less certain), or if the answer stays "
        "(paper, whose bound on the cross-entropy has no number).",
    )
    agreement: float = Field(default=0.99, ge=0, lt=1, description="Share of tokens that must stay (--rule tokens).")
    ce_ratio: float = Field(default=1.03, ge=1, description="Largest ratio of cross-entropies (--rule tokens).")
    ce_slack: float = Field(
        default=0.0,
        ge=0,
        description="Nats per token that --rule tokens allows beyond the ratio: where a model is certain, both "
        "cross-entropies are near zero and their ratio is noise. Neither paper nor code has it.",
    )
    targets: Literal["answers", "model"] = Field(
        default="answers",
        description="Which answers must not change: those of the samples (released code), or the model's own greedy "
        "ones, for samples without answers.",
    )
    answer_tokens: Count = Field(default=32, description="Most tokens of the model's own answers.")
    seed: TrainingSeed = 0

    @property
    def settings(self) -> RouterSettings:
        """The settings of the routers that are trained."""
        return RouterSettings(width=self.width, mean_over=self.mean_over)
