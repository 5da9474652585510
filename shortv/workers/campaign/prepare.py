"""Everything of a campaign that can be checked before work starts, and its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reports.campaign import CampaignManifest
from reports.manifest import State, plain, utc_now, versions
from shortv.workers.campaign.cells import Cell, list_cells
from shortv.workers.campaign.plans import Entry, ModelFacts, resolve_plans
from shortv.workers.campaign.record import CellRecord, CellState
from shortv.workers.campaign.results import Runner, TaskFacts
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.shipping import folder_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A campaign whose input is checked."""

    recipe: CampaignSpec
    models: tuple[ModelFacts, ...]
    entries: Mapping[str, tuple[Entry, ...]]
    tasks: tuple[TaskFacts, ...]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]


def prepare(recipe: CampaignSpec, runner: Runner) -> Prepared:
    """Read models, plans and tasks and list the cells.

    Raises:
        Refused: one of them cannot be right.
        ShortVError: the data of a task cannot be had.
    """
    models = tuple(_model(name, recipe, runner) for name in recipe.models)
    resolved = resolve_plans(recipe.plans, models)
    tasks = tuple(runner.task(name, recipe) for name in recipe.tasks)
    return Prepared(
        recipe=recipe,
        models=models,
        entries=resolved.entries,
        tasks=tasks,
        cells=tuple(list_cells(recipe, models, resolved.entries, tasks)),
        warnings=resolved.warnings,
    )


def describe_run(prepared: Prepared, before: CampaignManifest | None) -> CampaignManifest:
    """The manifest while cells run; what an earlier run on the folder took is carried on."""
    return CampaignManifest(
        state=State.RUNNING,
        arguments=prepared.recipe.arguments(),
        versions=versions(),
        models=tuple(_model_facts(model) for model in prepared.models),
        plans=tuple(
            _plan_facts(model.name, entry) for model in prepared.models for entry in prepared.entries[model.name]
        ),
        tasks=tuple(task._asdict() for task in prepared.tasks),
        seed=prepared.recipe.seed,
        attempts=(before.attempts if before else 0) + 1,
        started=before.started if before else utc_now(),
        wall_seconds=before.wall_seconds if before else None,
    )


def final_manifest(
    running: CampaignManifest,
    records: Mapping[str, CellRecord],
    before: CampaignManifest | None,
    *,
    seconds: float = 0.0,
) -> CampaignManifest:
    """The manifest at the end; with the manifest of an earlier end as `before`, that end's time stays."""
    states = Counter(record.state for record in records.values())
    whole = all(record.state is CellState.COMPLETE for record in records.values())
    counts = {
        "cells": len(records),
        **{state.value: states[state] for state in CellState},
        "samples": sum(record.n for record in records.values()),
        "errors": sum(record.errors for record in records.values()),
    }
    return replace(
        running,
        state=State.COMPLETE if whole else State.PARTIAL,
        counts=counts,
        attempts=before.attempts if before else running.attempts,
        finished=before.finished if before else utc_now(),
        wall_seconds=running.wall_seconds if before else seconds + (running.wall_seconds or 0.0),
    )


def _model(name: str, recipe: CampaignSpec, runner: Runner) -> ModelFacts:
    folder = Path(name)
    revision = runner.pin(name, recipe)
    return ModelFacts(
        name=name,
        revision=revision,
        architecture=runner.describe(name, recipe.model_copy(update={"revision": revision})),
        digest=folder_digest(folder.resolve()) if folder.is_dir() else None,
    )


def _model_facts(model: ModelFacts) -> dict[str, Any]:
    return {
        "name": model.name,
        "revision": model.revision,
        "digest": model.digest,
        "config_digest": model.architecture.config_digest,
        "architecture": asdict(model.architecture),
    }


def _plan_facts(model: str, entry: Entry) -> dict[str, Any]:
    plan = entry.plan
    facts = {
        "model": model,
        "name": plan.name,
        "kind": entry.kind,
        "same_as": entry.same_as,
        "digest": plan.digest,
        "modes": plan.modes,
        "parts": asdict(plan.parts) if plan.parts else None,
        "training": entry.training._asdict() if entry.training else None,
        "ranking": plan.ranking,
        "source": plan.source,
    }
    # As a file gives it back, so that manifests can be compared.
    return {name: plain(value) for name, value in facts.items()}
