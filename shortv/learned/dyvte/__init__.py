"""DyVTE: after a layer of the prefill a router may let a sample's visual tokens leave (arXiv 2411.19628)."""

from __future__ import annotations

from collections.abc import Sequence

from shortv.architecture import Architecture
from shortv.costs import Count, plan_flops
from shortv.errors import Refused
from shortv.learned.dyvte.recipe import DyvteRecipe, RouterSettings
from shortv.learned.system import PlanSpec, System
from shortv.plan import Mode, PartsKind, modes_of_exit


class Dyvte(System):
    """One router per decoder layer; the plan's threshold is the exit probability from which visual tokens leave.

    What a plan costs depends on the samples: `measured_exit_ratio` computes it from where their tokens left.
    """

    kind = PartsKind.DYVTE
    settings = RouterSettings
    recipe = DyvteRecipe
    classes = ("ExitRouters", "ExitRun", "RouterTrainer")
    needs_images = True

    def needs_answers(self, recipe: DyvteRecipe) -> bool:
        """Return whether labels come from the samples' answers, and not from the model's own."""
        return recipe.targets == "answers"

    def plans(
        self, settings: RouterSettings, num_layers: int, thresholds: Sequence[float] = ()
    ) -> tuple[PlanSpec, ...]:
        """Return a plan for each threshold; all layers are full, the routers decide."""
        return tuple(PlanSpec(f"dyvte-{value:g}", (Mode.FULL,) * num_layers, value) for value in thresholds)


def exit_flops(arch: Architecture, exit_layer: int, t: Count, v: Count) -> Count:
    """Return the prefill FLOPs of a sample whose visual tokens leave after `exit_layer`; the last layer or more: never.

    The routers are left out: a decision costs a ten-thousandth of a layer (section 3).
    """
    if exit_layer < 0:
        raise Refused(f"visual tokens cannot leave after layer {exit_layer}; layers are counted from 0")
    return plan_flops(arch, modes_of_exit(min(exit_layer, arch.num_layers), arch.num_layers), t, v)


def measured_exit_ratio(arch: Architecture, samples: Sequence[tuple[int, int, int]]) -> float | None:
    """Return the mean prefill FLOPs of samples, each an exit layer with t and v, divided by the full model's mean."""
    full = sum(plan_flops(arch, (Mode.FULL,) * arch.num_layers, t, v) for _, t, v in samples)
    return sum(exit_flops(arch, layer, t, v) for layer, t, v in samples) / full if full else None
