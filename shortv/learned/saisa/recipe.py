"""What SAISA's parts are (settings) and how they are trained (recipe)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from shortv.learned.system import BatchSize, Rate, TrainingSeed, learning_rate
from shortv.plan import Mode, modes_of_layers
from shortv.spec import Spec

LanguageModel = Literal["none", "attention", "layers", "all"]
Layer = Annotated[int, Field(ge=0, lt=4096, strict=True)]


class ProjectorSettings(Spec):
    """Which layers have a projector, and how much of the language model was trained with them."""

    layers: tuple[Layer, ...]
    language_model: LanguageModel = "none"
    """Weights that the parts hold in place of the base model's: none, the four attention projections of every layer,
    every layer, or all (layers, embeddings, final norm and head, as the paper's second stage trains them)."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError("list each layer once, in ascending order, at least one")
        return layers

    def modes(self, num_layers: int) -> tuple[Mode, ...]:
        """Return the only modes under which these parts run: a layer with a projector freezes, the others are full."""
        return modes_of_layers(Mode.FREEZE_VISUAL, self.layers, num_layers)


class Stage(NamedTuple):
    """What is trained in a step, and how fast."""

    joint: bool
    """Whether the language model is trained with the projectors."""
    opens: bool
    """Whether this is the stage's first step."""
    rate: float


class SaisaRecipe(Spec):
    """Two stages: the projectors alone, then projectors and language model (paper, section 4).

    Rates, warm-up and clipping are those of the LLaVA-1.5 recipe that the paper keeps; a small model needs higher ones.
    """

    seed: TrainingSeed = 0
    batch_size: BatchSize = 16
    projector_steps: int = Field(
        default=500,
        ge=0,
        le=2**31 - 1,
        description="Steps that train the projectors alone.",
        json_schema_extra={"flag": "--stage-1-steps"},
    )
    projector_rate: Rate = Field(
        default=1e-3,
        description="Learning rate of the steps that train the projectors alone.",
        json_schema_extra={"flag": "--stage-1-learning-rate"},
    )
    joint_steps: int = Field(
        default=1000, ge=0, le=2**31 - 1, description="Steps that train projectors and language model."
    )
    joint_rate: Rate = Field(
        default=2e-5,
        description="Learning rate of the steps that train both.",
        json_schema_extra={"flag": "--learning-rate"},
    )
    warmup_share: float = Field(default=0.03, ge=0, lt=1, description="Share of a stage's steps that warm up.")
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    first_stage: Literal["separate", "shared"] = Field(
        default="separate",
        description="Projectors of the first stage: one per layer (all start as copies of a trained one), or one for "
        "all layers (so the paper's reviews; that code is not released).",
    )
    language_model: LanguageModel = Field(
        default="all", description="What the second stage trains of the language model; all is the paper's choice."
    )
    layers: tuple[Layer, ...] | None = Field(default=None, description="Layers with a projector. [default: all]")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if not 1 <= self.steps < 2**31:
            raise ValueError(f"both stages together have {self.steps} steps; give at least 1")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.projector_steps + self.joint_steps

    def settings(self, num_layers: int) -> ProjectorSettings:
        """Return the settings of the parts that are trained."""
        layers = tuple(range(num_layers)) if self.layers is None else self.layers
        return ProjectorSettings(layers=layers, language_model=self.language_model if self.joint_steps else "none")

    def stage(self, step: int) -> Stage:
        """Return the stage of a step, counted from 0, and its learning rate: each stage warms up and decays."""
        joint = step >= self.projector_steps
        steps, peak = (self.joint_steps, self.joint_rate) if joint else (self.projector_steps, self.projector_rate)
        at = step - self.projector_steps if joint else step
        rate = learning_rate(at, steps=steps, peak=peak, warmup_steps=math.ceil(self.warmup_share * steps))
        return Stage(joint=joint, opens=at == 0, rate=rate)
