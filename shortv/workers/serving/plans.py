"""The plans that a replica serves, by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families.parts import Learned
from shortv.families.parts.files import check_parts
from shortv.plan import Mode, Plan
from shortv.request import FULL_MODEL
from shortv.workers.serving.learned import PartsShelf

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
        shelf: PartsShelf | None = None,
    ) -> None:
        """Check that each plan fits the model, and take its learned parts from the shelf.

        Without a shelf there are no weights: what can be known of the parts without them is checked.

        Raises:
            Refused: a plan is for another model, two different plans have one name, or learned parts are not there,
                for another model, or cannot run.
        """
        self._full = (Mode.FULL,) * architecture.num_layers
        self._plans: dict[str, Plan] = {}
        self._learned: dict[str, Learned | None] = {}
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
                self._learned[plan.name] = _learned(plan, shelf)
            except Refused as error:
                raise Refused(f"plan {plan.name!r}: {error}") from error

    def modes(self, name: str) -> tuple[Mode, ...] | None:
        """The modes of the plan of that name, None where there is none."""
        if name == FULL_MODEL:
            return self._full
        plan = self._plans.get(name)
        return plan.modes if plan else None

    def learned(self, name: str) -> Learned | None:
        """The learned parts that the plan of that name needs, if any."""
        return self._learned.get(name)

    def digest(self, name: str) -> str | None:
        """The digest of the plan of that name; the full model has none."""
        plan = self._plans.get(name)
        return plan.digest if plan else None

    def digests(self) -> dict[str, str]:
        """Digest by name, in the order given, without the full model."""
        return {name: plan.digest for name, plan in self._plans.items()}


def _learned(plan: Plan, shelf: PartsShelf | None) -> Learned | None:
    if shelf is not None:
        return shelf.learned(plan)
    if plan.parts is not None:
        check_parts(plan.parts, plan.config_digest)
    return None


def read_plans(sources: Iterable[PlanSource]) -> list[Plan]:
    """Read plans from files, folders, published names and contents of plan files. Raises Refused."""
    return [
        Plan.load(source) if isinstance(source, str) else Plan.from_json(json.dumps(dict(source))) for source in sources
    ]
