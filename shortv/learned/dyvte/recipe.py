"""Everything that trained routers depend on besides model and samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shortv.errors import Refused
from shortv.families.parts.dyvte import MeanOver, RouterSettings
from shortv.learned.trainer import check_rates

Rule = Literal["tokens", "exact"]
Targets = Literal["answers", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How routers are trained; the defaults are the paper's (1 % of LLaVA's 665,000 samples, once) and its code's.

    `rule` says when an exit is safe. `tokens` (the released code, and the default, since it also sees an answer that
    only became less sure): more than `agreement` of the answer's tokens keep their most likely token, and the
    cross-entropy stays below `ce_ratio` times the full model's. `exact` (the paper's rule): all tokens keep it, so the
    answer is the same; what the paper demands of the cross-entropy besides has no number there.
    `ce_slack`, nats per token, is allowed on top of the ratio: where a model is sure of its answers both
    cross-entropies are next to zero and their ratio is noise. Neither paper nor code has it, so it is 0.
    `targets` are the answers of the samples, or with `model` the model's own greedy ones of at most `answer_tokens`
    tokens, for samples that have none.
    """

    width: int = 2048
    mean_over: MeanOver = "after-image"
    steps: int = 416
    batch_size: int = 16
    learning_rate: float = 4e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    rule: Rule = "tokens"
    agreement: float = 0.99
    ce_ratio: float = 1.03
    ce_slack: float = 0.0
    targets: Targets = "answers"
    answer_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.settings
        for name in ("steps", "batch_size", "answer_tokens"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} is {getattr(self, name)}; give at least 1")
        check_rates({"--learning-rate": self.learning_rate})
        if not 0 <= self.agreement < 1:
            raise Refused(f"agreement is {self.agreement:g}; give a share of tokens, from 0 to below 1")
        if not 1 <= self.ce_ratio < math.inf:
            raise Refused(f"ce_ratio is {self.ce_ratio:g}; give a number of at least 1")
        if not 0 <= self.ce_slack < math.inf:
            raise Refused(f"--ce-slack is {self.ce_slack:g}; give nats per token, 0 or more")
        for name, known in (("rule", get_args(Rule)), ("targets", get_args(Targets))):
            if getattr(self, name) not in known:
                raise Refused(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")

    @property
    def settings(self) -> RouterSettings:
        """Those of the routers themselves."""
        return RouterSettings(width=self.width, mean_over=self.mean_over)
