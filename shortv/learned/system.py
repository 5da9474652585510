"""What every learned system says of itself, and what recipes have in common; without torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from shortv.architecture import Architecture
from shortv.plan import Mode, PartsKind, Plan

if TYPE_CHECKING:
    from shortv.families.decoder import Decoder
    from shortv.families.loading import LoadedModel
    from shortv.layers.progress import LearnedRun
    from shortv.learned.base import Parts
    from shortv.learned.training import Trainer

Rate = Annotated[float, Field(gt=0, le=1, description="Highest learning rate.")]
Steps = Annotated[int, Field(ge=1, le=2**31 - 1, description="Optimizer steps.")]
BatchSize = Annotated[
    int,
    Field(ge=1, le=2**31 - 1, description="Samples per step, over all workers.", json_schema_extra={"short": "-b"}),
]
TrainingSeed = Annotated[int, Field(ge=0, le=2**53 - 1, description="Of weights, order and generated samples.")]
Reduce = Callable[[Iterable[Any]], None]
"""Averages the gradients of parameters over the workers, in place; every worker calls it with the same parameters."""


def alone(_: Iterable[Any]) -> None:
    """Reduce for a single worker: its gradients are already the average."""


class PlanSpec(NamedTuple):
    """A plan that runs trained parts."""

    name: str
    modes: tuple[Mode, ...]
    threshold: float | None = None


class System(ABC):
    """A learned system: its settings, recipe, plans and costs. Its modules are imported when they are needed."""

    kind: ClassVar[PartsKind]
    settings: ClassVar[type[Any]]
    """What the weights alone do not say; stored beside them."""
    recipe: ClassVar[type[Any]]
    """What a training depends on besides model and samples; has at least `steps`, `batch_size` and `seed`."""
    classes: ClassVar[tuple[str, str, str]]
    """Names of the parts, their run and their trainer in `parts`, `run` and `train` of the system's package."""
    questions: ClassVar[tuple[str, ...]] = ()
    """Kinds of question in the bundled model's default training set; empty: all of them."""
    needs_images: bool = False
    """Whether samples without an image teach nothing."""

    def needs_answers(self, recipe: Any) -> bool:
        """Return whether a recipe learns from the samples' answers."""
        return True

    @abstractmethod
    def plans(self, settings: Any, num_layers: int, thresholds: Sequence[float]) -> tuple[PlanSpec, ...]:
        """Return the plans to write for trained parts: one, or one per threshold."""

    def flops_ratio(self, plan: Plan, arch: Architecture, t: float, v: float) -> float | None:
        """Return a plan's prefill FLOPs divided by the full model's at t text and v visual tokens; None if unknown."""
        return plan.flops_ratio

    def parts_class(self) -> type[Parts]:
        """Return the module class of the parts."""
        found: type[Parts] = self._imported("parts", self.classes[0])
        return found

    def run(self, decoder: Decoder, modes: Sequence[Mode], parts: Parts, threshold: float | None = None) -> LearnedRun:
        """Return how the parts run under these modes. Raises Refused where they cannot."""
        found: LearnedRun = self._imported("run", self.classes[1])(decoder, modes, parts, threshold)
        return found

    def trainer(self, loaded: LoadedModel, recipe: Any, reduce: Reduce = alone) -> Trainer[Any]:
        """Return a trainer before its first step. Raises Refused where the model cannot have such parts."""
        found: Trainer[Any] = self._imported("train", self.classes[2])(loaded, recipe, reduce)
        return found

    def _imported(self, module: str, name: str) -> Any:
        return getattr(import_module(f"{type(self).__module__}.{module}"), name)


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int = 0, last: float = 0.01) -> float:
    """Return the rate of a step: a linear warm-up to `peak`, then a cosine down to `last` of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))
