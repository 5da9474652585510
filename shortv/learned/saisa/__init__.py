"""SAISA: frozen layers whose visual rows come from projectors of their own (arXiv 2502.02458)."""

from __future__ import annotations

from collections.abc import Sequence

from shortv.architecture import Architecture
from shortv.costs import layer_flops, plan_flops
from shortv.errors import Refused
from shortv.learned.saisa.recipe import ProjectorSettings, SaisaRecipe
from shortv.learned.system import PlanSpec, System
from shortv.plan import Mode, PartsKind, Plan


class Saisa(System):
    """Projectors for single layers, and optionally the language model as trained with them."""

    kind = PartsKind.SAISA
    settings = ProjectorSettings
    recipe = SaisaRecipe
    classes = ("Projectors", "ProjectedRun", "ProjectorTrainer")

    def plans(
        self, settings: ProjectorSettings, num_layers: int, thresholds: Sequence[float] = ()
    ) -> tuple[PlanSpec, ...]:
        """Return the one plan under which the parts run."""
        return (PlanSpec("saisa", settings.modes(num_layers)),)

    def flops_ratio(self, plan: Plan, arch: Architecture, t: float, v: float) -> float | None:
        """Return the ratio with the projectors, where the plan's source has `projector_weights`."""
        weights = (plan.source or {}).get("projector_weights")
        if not isinstance(weights, int):
            return plan.flops_ratio
        return saisa_flops_ratio(arch, plan.modes, t, v, projector_weights=weights)


def saisa_flops_ratio(
    arch: Architecture, modes: Sequence[Mode], t: float, v: float, *, projector_weights: int
) -> float:
    """Return the prefill FLOPs of SAISA divided by those of the full model and its one projector (abstract: 34 %).

    `projector_weights` is how many weights of one projector meet each visual token: c h + h^2 for two layers of width h
    on features of width c. The base model's projector, whose output SAISA does not need, is left out.
    """
    if t + v <= 0:
        raise Refused("a FLOPs ratio needs at least one token, found none; check the samples")
    projector = 2 * v * projector_weights
    full = arch.num_layers * layer_flops(arch, Mode.FULL, t, v) + projector
    return (plan_flops(arch, modes, t, v) + projector * list(modes).count(Mode.FREEZE_VISUAL)) / full
