"""The cells of a campaign: model x plan x task, each known by the digest of all that decides its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from reports.manifest import digest_of, versions
from shortv.workers.campaign.plans import Entry, ModelFacts
from shortv.workers.campaign.results import TaskFacts
from shortv.workers.campaign.spec import CampaignSpec

# Part of every key: a change to what a cell holds makes the old ones unfinished.
CELL_VERSION: Final = 3
_COMPUTING: Final = ("shortv", "torch", "torchvision", "transformers", "lmms-eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model under one plan on one task.

    `identity` is what decides the result and `key` its digest; plans with the same modes share both.
    """

    model: ModelFacts
    entry: Entry
    task: TaskFacts
    identity: Mapping[str, Any]
    key: str

    @property
    def shown(self) -> str:
        """The cell in messages."""
        return f"{self.model.name} {self.entry.name} {self.task.name}"


def list_cells(
    recipe: CampaignSpec,
    models: Sequence[ModelFacts],
    entries: Mapping[str, Sequence[Entry]],
    tasks: Sequence[TaskFacts],
) -> list[Cell]:
    """Return all cells: by model, then by task, so that plans of a task follow each other, the full model first."""
    return [_cell(recipe, model, entry, task) for model in models for task in tasks for entry in entries[model.name]]


def _cell(recipe: CampaignSpec, model: ModelFacts, entry: Entry, task: TaskFacts) -> Cell:
    found = versions()
    identity = {
        "cell_version": CELL_VERSION,
        # A folder is its content, wherever it lies.
        "model": model.digest or model.name,
        "revision": model.revision,
        "config_digest": model.architecture.config_digest,
        "plan_digest": entry.plan.digest,
        "task": task.name,
        "task_digest": task.digest,
        "limit": recipe.limit,
        "seed": recipe.seed,
        "gen_kwargs": recipe.gen_kwargs,
        "dtype": recipe.dtype,
        "attn_implementation": recipe.attn_implementation,
        "versions": {name: found[name] for name in _COMPUTING},
    }
    return Cell(model=model, entry=entry, task=task, identity=MappingProxyType(identity), key=digest_of(identity))
