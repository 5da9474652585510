"""EAS: layers that skip their attention, with an adapter folded into their FFN (arXiv 2403.15226)."""

from __future__ import annotations

from collections.abc import Sequence

from shortv.architecture import Architecture
from shortv.costs import flops_ratio, plan_flops
from shortv.learned.eas.recipe import EasRecipe, EasSettings
from shortv.learned.system import PlanSpec, System
from shortv.plan import Mode, PartsKind, Plan


class Eas(System):
    """Adapters for one task, and a search for the layers whose attention that task does not need."""

    kind = PartsKind.EAS
    settings = EasSettings
    recipe = EasRecipe
    classes = ("Adapters", "AdaptedRun", "AdapterTrainer")
    questions = ("shape-of-colour",)

    def plans(self, settings: EasSettings, num_layers: int, thresholds: Sequence[float] = ()) -> tuple[PlanSpec, ...]:
        """Return the one plan under which the parts run."""
        return (PlanSpec(f"eas-{len(settings.skipped)}", settings.modes(num_layers)),)

    def flops_ratio(self, plan: Plan, arch: Architecture, t: float, v: float) -> float | None:
        """Return the ratio with the adapters, where the plan's source has `adapter_weights`."""
        weights = (plan.source or {}).get("adapter_weights")
        if not isinstance(weights, int):
            return plan.flops_ratio
        return adapted_flops_ratio(arch, plan.modes, t, v, adapter_weights=weights)


def adapted_flops_ratio(
    arch: Architecture, modes: Sequence[Mode], t: float, v: float, *, adapter_weights: int
) -> float:
    """Return the prefill FLOPs of EAS divided by those of the full model, which has no adapters; may be above 1.

    `adapter_weights` is how many weights meet each token, over all layers.
    """
    full = plan_flops(arch, (Mode.FULL,) * arch.num_layers, t, v)
    return flops_ratio(arch, modes, t, v) + 2 * (t + v) * adapter_weights / full
