"""What a training of SAISA's parts depends on, beside its samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from shortv.errors import Refused
from shortv.families.parts.saisa import LanguageModel, ProjectorSettings
from shortv.learned.trainer import check_rates, learning_rate

FirstStage = Literal["separate", "shared"]


class Stage(NamedTuple):
    """What is trained in a step, and how fast."""

    joint: bool
    """Whether the language model is trained with the projectors."""
    opens: bool
    """Whether this is the stage's first step."""
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaisaRecipe:
    """Two stages: the projectors alone, then projectors and language model (`reference/saisa.md`, section 4).

    Rates, warm-up and clipping are those of the LLaVA-1.5 recipe that the paper keeps; a small model needs higher ones.
    The training code is not released: by the reviews the first stage has one projector for all layers ("shared"),
    while projectors that start as copies of a trained one may as well part at once ("separate", the default).

    `layers` are those with a projector, None means all. `language_model` says what the second stage trains of the
    language model (`ProjectorSettings`); with "none" it goes on with the projectors at its own rate.
    """

    seed: int = 0
    batch_size: int = 16
    projector_steps: int = 500
    projector_rate: float = 1e-3
    joint_steps: int = 1000
    joint_rate: float = 2e-5
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    first_stage: FirstStage = "separate"
    language_model: LanguageModel = "all"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise Refused(f"the batch size is {self.batch_size}; give at least 1")
        if min(self.projector_steps, self.joint_steps) < 0 or not self.steps:
            raise Refused(
                f"--steps is {self.steps}, of which --stage-1-steps are {self.projector_steps}; give at least 1 step, "
                "and of them 0 to all to stage 1"
            )
        check_rates({"--stage-1-learning-rate": self.projector_rate, "--learning-rate": self.joint_rate})
        if not 0 < self.gradient_norm < math.inf:
            raise Refused(f"gradient_norm is {self.gradient_norm:g}; give a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise Refused(f"weight_decay is {self.weight_decay}; give zero or a positive number")
        if not 0 <= self.warmup_share < 1:
            raise Refused(f"warmup_share is {self.warmup_share}; give the share of a stage's steps, from 0 to below 1")
        if self.first_stage not in get_args(FirstStage):
            raise Refused(
                f"the first stage cannot be {self.first_stage!r}; choose one of {', '.join(get_args(FirstStage))}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.projector_steps + self.joint_steps

    def settings(self, num_layers: int) -> ProjectorSettings:
        """Those of the parts that are trained. Raises Refused."""
        layers = tuple(range(num_layers)) if self.layers is None else self.layers
        return ProjectorSettings(layers=layers, language_model=self.language_model if self.joint_steps else "none")

    def stage(self, step: int) -> Stage:
        """The stage of a step, counted from 0, and its learning rate: a warm-up and a cosine in each stage."""
        joint = step >= self.projector_steps
        steps, peak = (self.joint_steps, self.joint_rate) if joint else (self.projector_steps, self.projector_rate)
        at = step - self.projector_steps if joint else step
        rate = learning_rate(at, steps=steps, peak=peak, warmup_steps=math.ceil(self.warmup_share * steps))
        return Stage(joint=joint, opens=at == 0, rate=rate)
