"""What every learned system says of itself, without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from shortv.architecture import Architecture
from shortv.plan import Mode, PartsKind, Plan

if TYPE_CHECKING:
    from shortv.families.decoder import Decoder
    from shortv.families.loading import LoadedModel
    from shortv.layers.progress import LearnedRun
    from shortv.learned.base import Parts
    from shortv.learned.training import Trainer

Reduce = Callable[[Iterable[Any]], None]
"""Averages the gradients of parameters over the workers, in place; every worker calls it with the same parameters."""


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
    needs_images: ClassVar[bool] = False
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

    def trainer(self, loaded: LoadedModel, recipe: Any, reduce: Reduce) -> Trainer[Any]:
        """Return a trainer before its first step. Raises Refused where the model cannot have such parts."""
        found: Trainer[Any] = self._imported("train", self.classes[2])(loaded, recipe, reduce)
        return found

    def _imported(self, module: str, name: str) -> Any:
        return getattr(import_module(f"{type(self).__module__}.{module}"), name)
