"""The driver of a campaign: checks, runs the cells that are missing, commits each, and reports the result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from reports.manifest import CampaignManifest, State, plain, utc_now, versions
from shortv.errors import Refused
from shortv.plan import Plan
from shortv.terminal import console as default_console
from shortv.terminal import say
from shortv.workers.campaign.cells import (
    Cell,
    CellRecord,
    CellState,
    RunCell,
    Runner,
    TaskFacts,
    failed_record,
    list_cells,
    record_of,
)
from shortv.workers.campaign.folder import CampaignFolder, open_campaign
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, PlanKind, resolve_plans
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.summary import main_metric, print_summary
from shortv.workers.campaign.tables import Scores, build_tables
from shortv.workers.run import PARTIAL_STATUS, Stopped, stop_on_signal, write_report
from shortv.workers.shipping import folder_digest


def run_campaign(spec: CampaignSpec, *, runner: Runner, console: Console | None = None) -> int:
    """Run, continue or repeat a campaign, print its tables, and return the exit status (0, or 3 with failures).

    Raises:
        Refused: the spec cannot be right; nothing was started.
        ShortVError: the work was stopped or results cannot be written; the same command continues it.
    """
    console = console or default_console()
    with stop_on_signal():
        prepared = prepare(spec, runner)
        for warning in prepared.warnings:
            say(console, f"Warning: {warning}")
        with open_campaign(spec.output_path) as folder:
            run = _Run(prepared=prepared, runner=runner, folder=folder, console=console)
            worked = run.run()
            status = run.report()
            write_report(folder.folder, console, anew=worked)
            return status


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run of the command on an open folder."""

    prepared: Prepared
    runner: Runner
    folder: CampaignFolder
    console: Console
    records: dict[str, CellRecord] = field(default_factory=dict)
    scores: Scores = field(init=False)

    def __post_init__(self) -> None:
        self.scores = Scores(self.folder, seed=self.prepared.spec.seed)

    def run(self) -> bool:
        """Run what is missing and return True; a finished campaign of the same spec is left as it is."""
        started = time.monotonic()
        before = self.folder.manifest()
        found = self.folder.find(self.prepared.cells)
        self.records = found.records
        for line in found.damaged:
            say(self.console, f"Warning: {line}")
        pending = self._pending()
        keys = {cell.key for cell in self.prepared.cells}
        say(self.console, f"{len(keys)} cells, {len(keys) - len(pending)} finished")
        wanted = describe_run(self.prepared, before)
        if not pending and before == final_manifest(wanted, self.records, before) and self.folder.has_tables():
            return False
        self.folder.folder.check_writable()
        wanted.save(self.folder.folder)
        for model in dict.fromkeys(cell.model.name for cell in pending):
            self._run_model([cell for cell in pending if cell.model.name == model])
        self._write_tables()
        seconds = time.monotonic() - started
        final_manifest(wanted, self.records, None, seconds=seconds).save(self.folder.folder)
        return True

    def report(self) -> int:
        """Print the tables and the failures; returns the exit status."""
        cells = self.prepared.cells
        print_summary(cells, self.records, build_tables(cells, self.records, self.scores), self.console)
        say(self.console, f"results in {self.folder.folder.shown}")
        tolerated = self.prepared.spec.fail_on_error
        shares = [
            1.0 if record.state is CellState.FAILED else record.errors / max(record.n, 1)
            for record in self.records.values()
        ]
        return PARTIAL_STATUS if any(share > tolerated for share in shares) else 0

    def _pending(self) -> list[Cell]:
        """The cells to run, one for all that share a key."""
        retry = self.prepared.spec.retry_failed
        first = {cell.key: cell for cell in reversed(self.prepared.cells)}
        distinct = [cell for cell in self.prepared.cells if first[cell.key] is cell]
        return [cell for cell in distinct if _is_pending(self.records.get(cell.key), retry)]

    def _run_model(self, cells: Sequence[Cell]) -> None:
        plans = {cell.entry.name: cell.entry.plan for cell in cells if cell.entry.kind is not PlanKind.FULL}
        with ExitStack() as stack:
            try:
                model = cells[0].model
                spec = self.prepared.spec.model_copy(update={"revision": model.revision})
                opened = self.runner.open(model.name, tuple(plans.values()), spec)
                run_cell = stack.enter_context(opened)
            except (Stopped, Refused):
                raise
            except Exception as error:  # whatever keeps a model's replicas away fails its cells alone
                for cell in cells:
                    self._commit(cell, failed_record(cell, error, utc_now(), 0.0))
                return
            for cell in cells:
                self._run_cell(run_cell, cell)

    def _run_cell(self, run_cell: RunCell, cell: Cell) -> None:
        started, clock = utc_now(), time.monotonic()
        plan: Plan | None = None if cell.entry.kind is PlanKind.FULL else cell.entry.plan
        try:
            result = run_cell(plan, cell.task.name)
            record = record_of(cell, result, started, time.monotonic() - clock)
        except Stopped:
            raise
        except Exception as error:  # tasks and judges run third-party code; their failures are the cell's
            self._commit(cell, failed_record(cell, error, started, time.monotonic() - clock))
            return
        if not self._keeps_old(cell, record):
            record = self.folder.write_answers(cell, result.samples, record)
        self._commit(cell, record)

    def _commit(self, cell: Cell, record: CellRecord) -> None:
        """Write the record and the tables. A retry that failed altogether does not undo what was there."""
        if self._keeps_old(cell, record):
            say(self.console, f"{cell.shown}: the retry failed, the earlier answers stay: {record.message}")
            return
        self.folder.write_record(record)
        self.records[cell.key] = record
        self._write_tables()
        keys = list(dict.fromkeys(one.key for one in self.prepared.cells))
        done = sum(key in self.records for key in keys)
        say(self.console, f"[{done}/{len(keys)}] {cell.shown}: {self._outcome(cell, record)}")

    def _keeps_old(self, cell: Cell, record: CellRecord) -> bool:
        before = self.records.get(cell.key)
        return record.state is CellState.FAILED and before is not None and before.state is not CellState.FAILED

    def _outcome(self, cell: Cell, record: CellRecord) -> str:
        if record.state is CellState.FAILED:
            return f"failed: {record.message}"
        name = main_metric([cell], {cell.key: record})
        value = next((found.value for found in record.metrics if found.metric == name), None)
        score = f"{name} {value:.4f}, " if value is not None else ""
        errors = f", {record.errors} failed" if record.errors else ""
        return f"{score}{record.n} samples in {record.wall_seconds:.1f} s{errors}"

    def _write_tables(self) -> None:
        self.folder.write_tables(build_tables(self.prepared.cells, self.records, self.scores))


def _is_pending(record: CellRecord | None, retry: bool) -> bool:
    return record is None or (retry and record.state is not CellState.COMPLETE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A campaign whose input is checked."""

    spec: CampaignSpec
    models: tuple[ModelFacts, ...]
    entries: Mapping[str, tuple[PlanEntry, ...]]
    tasks: tuple[TaskFacts, ...]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]


def prepare(spec: CampaignSpec, runner: Runner) -> Prepared:
    """Read models, plans and tasks and list the cells.

    Raises:
        Refused: one of them cannot be right.
        ShortVError: the data of a task cannot be had.
    """
    models = tuple(_model_of(name, spec, runner) for name in spec.models)
    resolved = resolve_plans(spec.plans, models)
    tasks = tuple(runner.task(name, spec) for name in spec.tasks)
    return Prepared(
        spec=spec,
        models=models,
        entries=resolved.entries,
        tasks=tasks,
        cells=tuple(list_cells(spec, models, resolved.entries, tasks)),
        warnings=resolved.warnings,
    )


def describe_run(prepared: Prepared, before: CampaignManifest | None) -> CampaignManifest:
    """The manifest while cells run; what an earlier run on the folder took is carried on."""
    return CampaignManifest(
        state=State.RUNNING,
        arguments=prepared.spec.arguments(),
        versions=versions(),
        models=tuple(_model_facts(model) for model in prepared.models),
        plans=tuple(
            _plan_facts(model.name, entry) for model in prepared.models for entry in prepared.entries[model.name]
        ),
        tasks=tuple(task._asdict() for task in prepared.tasks),
        seed=prepared.spec.seed,
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
    return running.updated(
        state=State.COMPLETE if whole else State.PARTIAL,
        counts=counts,
        attempts=before.attempts if before else running.attempts,
        finished=before.finished if before else utc_now(),
        wall_seconds=running.wall_seconds if before else seconds + (running.wall_seconds or 0.0),
    )


def _model_of(name: str, spec: CampaignSpec, runner: Runner) -> ModelFacts:
    folder = Path(name)
    revision = runner.pin(name, spec)
    return ModelFacts(
        name=name,
        revision=revision,
        architecture=runner.describe(name, spec.model_copy(update={"revision": revision})),
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


def _plan_facts(model: str, entry: PlanEntry) -> dict[str, Any]:
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
