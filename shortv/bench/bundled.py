"""The bundled model under plans of its own, and its tasks, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortv.bench.specs import TINY
from shortv.families import load_architecture
from shortv.plan import Mode, Plan
from shortv.sweep.planning import Control, replacement_order

MODEL, TASKS = TINY / "model", TINY / "task"
CONTROLS = ((Control.LAST, 4), (Control.LAST, 5), (Control.LAST, 6), (Control.RANDOM, 5), (Control.FIRST, 5))
"""Five plans: the last layers, as a sweep of this model ranks them, and two controls."""


def plan_of(control: Control, count: int, mode: Mode = Mode.FREEZE_VISUAL) -> Plan:
    """Return a plan of the bundled model with a mode in so many layers; its name says which."""
    architecture = load_architecture(str(MODEL))
    order = replacement_order(tuple(range(architecture.num_layers)), mode, control=control)
    return Plan.of_layers(
        mode,
        order[:count],
        num_layers=architecture.num_layers,
        name=f"{mode.value}-{control}-{count}",
        model=str(MODEL),
        config_digest=architecture.config_digest,
    )


def saved(plans: Sequence[Plan], folder: Path) -> dict[str, Path]:
    """Write plans into a folder; returns their files by name."""
    return {plan.name: plan.save(folder / f"{plan.name}.json") for plan in plans}
