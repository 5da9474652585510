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
        """Return the ratio with the adapters, which the full model does not have; it may be above 1.

        The plan's source says how many weights of adapters meet each token, over all layers.
        """
        weights = (plan.source or {}).get("adapter_weights")
        if not isinstance(weights, int):
            return plan.flops_ratio
        full = plan_flops(arch, (Mode.FULL,) * arch.num_layers, t, v)
        return flops_ratio(arch, plan.modes, t, v) + 2 * (t + v) * weights / full
