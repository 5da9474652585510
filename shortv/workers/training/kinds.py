"""The systems that can be trained: how each makes its trainer, and which plans come of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from shortv.errors import Refused
from shortv.families.loading import LoadedModel
from shortv.families.parts import Parts
from shortv.learned.trainer import Executing, Reduce, Trainer, alone
from shortv.plan import Mode, PartsKind, modes_of_layers
from shortv.tiny.training_data import LEARNED_KINDS
from shortv.workers.training.outline import outline
from shortv.workers.training.request import TrainRequest
from shortv.workers.training.result import PlanSpec


class MakeTrainer(Protocol):
    """Builds a trainer for a loaded model, in the state before the first step."""

    def __call__(self, loaded: LoadedModel, recipe: Any, *, executing: Executing, reduce: Reduce) -> Trainer:
        """Raises Refused where the model cannot have such parts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A system. Its recipe is a frozen dataclass that has at least `steps`, `batch_size` and `seed`."""

    make_trainer: MakeTrainer
    plans: Callable[[Any, int, tuple[float, ...]], tuple[PlanSpec, ...]]
    """From the parts, the number of layers, and the thresholds that were asked for."""
    needs_answers: Callable[[Any], bool]
    """Whether a recipe learns from the samples' answers."""
    questions: tuple[str, ...]
    """Kinds of question that the bundled model's default training set is made of."""
    needs_images: bool = False
    """Whether samples without an image teach nothing."""

    def check(self, request: TrainRequest) -> None:
        """Make the trainer for the model's outline, and name the plans that would come of it.

        Raises:
            Refused: the model cannot have such parts, the recipe does not fit it, or two plans would have one name.
        """
        loaded = outline(request.model)
        trainer = self.make_trainer(loaded, request.recipe, executing=lambda *_: nullcontext(), reduce=alone)
        plans = self.plans(trainer.parts(), loaded.architecture.num_layers, request.thresholds)
        names = [plan.name for plan in plans]
        for name in names:
            if names.count(name) > 1:
                raise Refused(
                    f"{names.count(name)} plans would have the name {name}; give each --threshold once, and thresholds "
                    "that differ in six digits"
                )


def _saisa(loaded: LoadedModel, recipe: Any, *, executing: Executing, reduce: Reduce) -> Trainer:
    from shortv.learned.saisa import make_trainer

    return make_trainer(loaded, recipe, executing=executing, reduce=reduce)


def _dyvte(loaded: LoadedModel, recipe: Any, *, executing: Executing, reduce: Reduce) -> Trainer:
    from shortv.learned.dyvte import make_trainer

    return make_trainer(loaded, recipe, executing=executing, reduce=reduce)


def _eas(loaded: LoadedModel, recipe: Any, *, executing: Executing, reduce: Reduce) -> Trainer:
    from shortv.learned.eas import make_trainer

    return make_trainer(loaded, recipe, executing=executing, reduce=reduce)


def _projected(parts: Parts, num_layers: int, _: tuple[float, ...]) -> tuple[PlanSpec, ...]:
    return (PlanSpec(name="saisa", modes=parts.settings.modes(num_layers)),)


def _exiting(_: Parts, num_layers: int, thresholds: tuple[float, ...]) -> tuple[PlanSpec, ...]:
    modes = (Mode.FULL,) * num_layers
    return tuple(PlanSpec(name=f"dyvte-{value:g}", modes=modes, threshold=value) for value in thresholds)


def _adapted(parts: Parts, num_layers: int, _: tuple[float, ...]) -> tuple[PlanSpec, ...]:
    skipped = parts.settings.skipped
    return (PlanSpec(name=f"eas-{len(skipped)}", modes=modes_of_layers(Mode.SKIP_ATTENTION, skipped, num_layers)),)


KINDS: Mapping[PartsKind, Kind] = MappingProxyType(
    {
        PartsKind.SAISA: Kind(
            make_trainer=_saisa, plans=_projected, needs_answers=lambda _: True, questions=LEARNED_KINDS
        ),
        PartsKind.DYVTE: Kind(
            make_trainer=_dyvte,
            plans=_exiting,
            needs_answers=lambda recipe: recipe.targets == "answers",
            questions=LEARNED_KINDS,
            needs_images=True,
        ),
        PartsKind.EAS: Kind(
            make_trainer=_eas, plans=_adapted, needs_answers=lambda _: True, questions=("shape-of-colour",)
        ),
    }
)
