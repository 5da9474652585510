"""The learned systems, a line each, and what is asked of whichever system a plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shortv.architecture import Architecture
from shortv.costs import flops_ratio
from shortv.learned.dyvte import Dyvte
from shortv.learned.eas import Eas
from shortv.learned.saisa import Saisa
from shortv.learned.system import System
from shortv.plan import Mode, PartsKind, Plan

if TYPE_CHECKING:
    from shortv.families.decoder import Decoder
    from shortv.layers.progress import LearnedRun
    from shortv.learned.base import Parts

SYSTEMS: Mapping[PartsKind, System] = {system.kind: system for system in (Dyvte(), Eas(), Saisa())}


def run_of(decoder: Decoder, modes: Sequence[Mode], parts: Parts, threshold: float | None = None) -> LearnedRun:
    """Return how parts run under these modes. Raises Refused where they cannot."""
    return SYSTEMS[parts.kind].run(decoder, modes, parts, threshold)


def plan_flops_ratio(plan: Plan, arch: Architecture, t: float, v: float) -> float | None:
    """Return a plan's prefill FLOPs divided by the full model's, with its learned parts; None where that is unknown.

    Modes say what a layer leaves out, not what learned parts add: that is counted from the plan's source.
    """
    if plan.parts is None:
        return flops_ratio(arch, plan.modes, t, v)
    return SYSTEMS[plan.parts.kind].flops_ratio(plan, arch, t, v)
