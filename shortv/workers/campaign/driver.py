"""The driver of a campaign: checks the spec, runs the cells that are missing, commits each, and prints the tables."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from reports.manifest import CampaignManifest, State, plain, utc_now, versions
from reports.store import Folder
from shortv.errors import Refused
from shortv.evals.scoring import ScoredSample
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
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, PlanKind, resolve_plans
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.summary import print_summary, result_line
from shortv.workers.campaign.tables import Scores, build_tables
from shortv.workers.run import (
    Stopped,
    attempt,
    check_output,
    exit_status,
    find_manifest,
    one_driver,
    stop_on_signal,
    write_report,
)
from shortv.workers.shipping import folder_digest


def run_campaign(spec: CampaignSpec, *, runner: Runner, console: Console | None = None) -> int:
    """Run, continue or repeat a campaign, print its tables, and return the exit status (0, or 3 with failures).

    Raises:
        Refused: the spec cannot be right; nothing was started.
        ShortVError: the work was stopped or results cannot be written; the same command continues it.
    """
    console = console or default_console()
    with stop_on_signal():
        check_output(spec.output_path)
        folder = Folder(spec.output_path)
        # A folder of another run is refused before models and tasks are read.
        find_manifest(folder, CampaignManifest)
        prepared = prepare(spec, runner)
        for warning in prepared.warnings:
            say(console, f"Warning: {warning}")
        with one_driver(folder):
            campaign = _Campaign(prepared=prepared, runner=runner, folder=CampaignFolder(folder), console=console)
            worked = campaign.run()
            campaign.report()
            write_report(folder, console, anew=worked)
            return campaign.exit_status()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A campaign whose input is checked."""

    spec: CampaignSpec
    models: tuple[ModelFacts, ...]
    entries: Mapping[str, tuple[PlanEntry, ...]]
    tasks: tuple[TaskFacts, ...]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]

    def distinct(self) -> dict[str, Cell]:
        """Return the cells by key, in order; of cells that share a key, the first."""
        found: dict[str, Cell] = {}
        for cell in self.cells:
            found.setdefault(cell.key, cell)
        return found


def prepare(spec: CampaignSpec, runner: Runner) -> Prepared:
    """Read models, plans and tasks, and list the cells.

    Raises:
        Refused: one of them cannot be right.
        ShortVError: the data of a task cannot be loaded.
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


@dataclass(slots=True, kw_only=True)
class _Campaign:
    """A campaign in a locked folder; `records` are those of its finished cells by key."""

    prepared: Prepared
    runner: Runner
    folder: CampaignFolder
    console: Console
    records: dict[str, CellRecord] = field(default_factory=dict)
    scores: Scores = field(init=False)

    def __post_init__(self) -> None:
        self.scores = Scores(self.folder, seed=self.prepared.spec.seed)

    def run(self) -> bool:
        """Run the cells that are missing and return True; a finished campaign of the same spec is not changed."""
        folder = self.folder.folder
        before = find_manifest(folder, CampaignManifest)
        self.records, damaged = self.folder.read_records(self.prepared.distinct())
        for line in damaged:
            say(self.console, f"Warning: {line}; the cell runs again")
        pending = self._pending()
        total = len(self.prepared.distinct())
        say(self.console, f"{total} cells, {total - len(pending)} finished")
        wanted = describe_run(self.prepared, before)
        if not pending and _is_finished(before, wanted) and self.folder.has_tables():
            return False
        folder.check_writable()
        attempt(folder, wanted, lambda running: self._run_cells(running, pending))
        return True

    def report(self) -> None:
        """Print the tables and the failures."""
        cells = self.prepared.cells
        print_summary(cells, self.records, build_tables(cells, self.records, self.scores), self.console)
        say(self.console, f"results in {self.folder.folder.shown}")

    def exit_status(self) -> int:
        """Return 0 when no cell lacks more than the tolerated share of its samples, else 3."""
        tolerated = self.prepared.spec.fail_on_error
        failed = [
            (1, 1) if record.state is CellState.FAILED else (record.errors, record.n)
            for record in self.records.values()
        ]
        return max(exit_status(errors, total, tolerated) for errors, total in failed)

    def _pending(self) -> list[Cell]:
        """Return the cells to run, one for all that share a key."""
        retry = self.prepared.spec.retry_failed
        finished = {key for key, record in self.records.items() if record.state is CellState.COMPLETE or not retry}
        return [cell for key, cell in self.prepared.distinct().items() if key not in finished]

    def _run_cells(self, running: CampaignManifest, pending: Sequence[Cell]) -> CampaignManifest:
        """Run cells model by model, and return the final manifest."""
        for model in dict.fromkeys(cell.model.name for cell in pending):
            self._run_model([cell for cell in pending if cell.model.name == model])
        self._write_tables()
        states = Counter(record.state for record in self.records.values())
        counts = {
            "cells": len(self.records),
            **{state.value: states[state] for state in CellState},
            "samples": sum(record.n for record in self.records.values()),
            "errors": sum(record.errors for record in self.records.values()),
        }
        whole = states[CellState.COMPLETE] == len(self.records)
        return running.updated(state=State.COMPLETE if whole else State.PARTIAL, counts=counts)

    def _run_model(self, cells: Sequence[Cell]) -> None:
        model = cells[0].model
        plans = {cell.entry.name: cell.entry.plan for cell in cells if cell.entry.kind is not PlanKind.FULL}
        spec = self.prepared.spec.model_copy(update={"revision": model.revision})
        with ExitStack() as stack:
            try:
                run_cell = stack.enter_context(self.runner.open(model.name, tuple(plans.values()), spec))
            except (Stopped, Refused):
                raise
            except Exception as error:  # without replicas of this model, only its own cells fail
                for cell in cells:
                    self._commit(cell, failed_record(cell, error, utc_now(), 0.0))
                return
            for cell in cells:
                self._run_cell(run_cell, cell)

    def _run_cell(self, run_cell: RunCell, cell: Cell) -> None:
        started, clock = utc_now(), time.monotonic()
        plan = None if cell.entry.kind is PlanKind.FULL else cell.entry.plan
        samples: Sequence[ScoredSample] = ()
        try:
            result = run_cell(plan, cell.task.name)
            record = record_of(cell, result, started, time.monotonic() - clock)
            samples = result.samples
        except Stopped:
            raise
        except Exception as error:  # tasks and judges run third-party code; its errors are failures of the cell
            record = failed_record(cell, error, started, time.monotonic() - clock)
        self._commit(cell, record, samples)

    def _commit(self, cell: Cell, record: CellRecord, samples: Sequence[ScoredSample] = ()) -> None:
        """Write the cell and all tables. A retry that failed does not replace the samples of an earlier run."""
        before = self.records.get(cell.key)
        if record.state is CellState.FAILED and before is not None and before.state is not CellState.FAILED:
            say(self.console, f"{cell.shown}: the retry failed, the earlier answers stay: {record.message}")
            return
        self.records[cell.key] = self.folder.commit(cell, record, samples)
        self._write_tables()
        total = len(self.prepared.distinct())
        say(self.console, f"[{len(self.records)}/{total}] {cell.shown}: {result_line(cell, record)}")

    def _write_tables(self) -> None:
        self.folder.write_tables(build_tables(self.prepared.cells, self.records, self.scores))


def describe_run(prepared: Prepared, before: CampaignManifest | None) -> CampaignManifest:
    """Return the manifest with which this run starts. It adds to the attempts and the time of an earlier run."""
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
        attempts=before.attempts if before else 0,
        started=before.started if before else utc_now(),
        wall_seconds=before.wall_seconds if before else None,
    )


def _is_finished(before: CampaignManifest | None, wanted: CampaignManifest) -> bool:
    """Whether an earlier run with the same settings, models, plans, tasks and versions came to its end."""
    if before is None or before.state is State.RUNNING:
        return False
    return before == wanted.updated(state=before.state, counts=before.counts, finished=before.finished)


def _model_of(name: str, spec: CampaignSpec, runner: Runner) -> ModelFacts:
    revision = runner.pin(name, spec)
    return ModelFacts(
        name=name,
        revision=revision,
        architecture=runner.describe(name, spec.model_copy(update={"revision": revision})),
        digest=folder_digest(name),
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
    # The same values as after reading the file, so that manifests can be compared.
    return {name: plain(value) for name, value in facts.items()}
