"""The plans that a replica serves, by name, and what each needs beside its modes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.layers.progress import LearnedRun
from shortv.learned.header import check_parts
from shortv.plan import Mode, Plan
from shortv.request import FULL_MODEL

PlanSource = str | Mapping[str, Any]
"""A plan file, a folder with shortv_plan.json, a published plan's name, or the content of a plan file."""


class PlanBook:
    """Plans of one model by name; the full model is always there, under FULL_MODEL."""

    def __init__(
        self,
        architecture: Architecture,
        plans: Iterable[Plan],
        *,
        model: str,
        revision: str | None,
        runs: Callable[[Plan], LearnedRun | None] | None = None,
    ) -> None:
        """Check that each plan fits the model, and load its learned parts with `runs`.

        Without `runs` there are no weights, and only the headers of learned parts are checked.

        Raises:
            Refused: a plan is for another model, two different plans have one name, or learned parts are missing, for
                another model, or cannot run.
        """
        self._full = (Mode.FULL,) * architecture.num_layers
        self._plans: dict[str, Plan] = {}
        self._runs: dict[str, LearnedRun | None] = {}
        self.warnings: list[str] = []
        for plan in plans:
            known = self._plans.setdefault(plan.name, plan)
            if known.digest != plan.digest:
                raise Refused(f"two different plans are named {plan.name!r}; give one of them another name")
            self.warnings += plan.check_fits(
                config_digest=architecture.config_digest,
                num_layers=architecture.num_layers,
                model=model,
                revision=revision,
            )
            try:
                if runs is not None:
                    self._runs[plan.name] = runs(plan)
                elif plan.parts is not None:
                    check_parts(plan.parts, plan.config_digest)
            except Refused as error:
                raise Refused(f"plan {plan.name!r}: {error}") from error

    def modes(self, name: str) -> tuple[Mode, ...] | None:
        """Return the modes of the plan of that name, None if there is none."""
        if name == FULL_MODEL:
            return self._full
        plan = self._plans.get(name)
        return plan.modes if plan else None

    def run(self, name: str) -> LearnedRun | None:
        """Return what the plan of that name needs beside its modes, if anything."""
        return self._runs.get(name)

    def digest(self, name: str) -> str | None:
        """Return the digest of the plan of that name; the full model has none."""
        plan = self._plans.get(name)
        return plan.digest if plan else None

    def digests(self) -> dict[str, str]:
        """Return the digest of each plan by name, in the order given, without the full model."""
        return {name: plan.digest for name, plan in self._plans.items()}


def read_plans(sources: Iterable[PlanSource]) -> list[Plan]:
    """Read plans from files, folders, published names and contents of plan files. Raises Refused."""
    return [
        Plan.load(source) if isinstance(source, str) else Plan.from_json(json.dumps(dict(source))) for source in sources
    ]
