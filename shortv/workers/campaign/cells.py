"""The cells of a campaign, model x plan x task: what decides the answers of a cell, and what the cells share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from reports.manifest import digest_of, versions
from shortv.evals.benchmark import Benchmark
from shortv.plan import Plan
from shortv.request import FULL_MODEL
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, PlanKind
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import UnitCell

# Part of every key: a change to what an answer is makes earlier answers those of another cell.
CELL_VERSION: Final = 5
_COMPUTING: Final = ("shortv", "torch", "torchvision", "transformers", "lmms-eval")


class CellState(StrEnum):
    """How a cell ended: with all samples, without some of them, or without any."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model under one plan on one task.

    `key` is the digest of what decides an answer, beside the document; plans with the same digest share it, and so do
    recipes that differ in the number of documents.
    """

    model: ModelFacts
    entry: PlanEntry
    task: Benchmark
    key: str

    @classmethod
    def of(cls, spec: CampaignSpec, model: ModelFacts, entry: PlanEntry, task: Benchmark) -> Cell:
        """Return the cell of a campaign with these settings."""
        found = versions()
        identity = {
            "cell_version": CELL_VERSION,
            # A local model is identified by its content, not by its path.
            "model": model.digest or model.name,
            "revision": model.revision,
            "config_digest": model.architecture.config_digest,
            "plan_digest": entry.plan.digest,
            "task": task.name,
            "task_digest": task.digest,
            "seed": spec.seed,
            "gen_kwargs": spec.gen_kwargs,
            "dtype": spec.dtype,
            "attn_implementation": spec.attn_implementation,
            "versions": {name: found[name] for name in _COMPUTING},
        }
        return cls(model=model, entry=entry, task=task, key=digest_of(identity))

    @property
    def names(self) -> dict[str, str]:
        """What every table says of the cell."""
        return {"cell": self.key, "model": self.model.name, "plan": self.entry.name, "task": self.task.name}

    @property
    def shown(self) -> str:
        """Return the name of the cell in messages."""
        return f"{self.model.name} {self.entry.name} {self.task.name}"

    @property
    def plan(self) -> Plan | None:
        """The plan of the cell, None for the unmodified model."""
        return None if self.entry.kind is PlanKind.FULL else self.entry.plan

    def in_unit(self) -> UnitCell:
        """Return the cell as producers get it."""
        plan = self.plan
        return UnitCell(
            **self.names,
            served=plan.name if plan else FULL_MODEL,
            plan_digest=plan.digest if plan else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All cells of one model and one task, in the order of the recipe; the first is the full model."""

    model: ModelFacts
    task: Benchmark
    cells: Sequence[Cell]

    @property
    def shown(self) -> str:
        """Return the name of the group in messages."""
        return f"{self.model.name} {self.task.name}"

    @property
    def distinct(self) -> Mapping[str, Cell]:
        """The cells by key, without those that are another name of an earlier one."""
        found: dict[str, Cell] = {}
        for cell in self.cells:
            found.setdefault(cell.key, cell)
        return found


def groups_of(
    spec: CampaignSpec,
    models: Sequence[ModelFacts],
    entries: Mapping[str, Sequence[PlanEntry]],
    tasks: Sequence[Benchmark],
) -> list[Group]:
    """Return the groups of a campaign, ordered by model, then by task."""
    return [
        Group(
            model=model,
            task=task,
            cells=tuple(Cell.of(spec, model, entry, task) for entry in entries[model.name]),
        )
        for model in models
        for task in tasks
    ]


def names_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the model, task and plan of a row of any table."""
    return row["model"], row["task"], row["plan"]
