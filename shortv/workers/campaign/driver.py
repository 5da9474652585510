"""The driver of a campaign: checks the spec, runs the cells that are missing, commits each, and prints the tables."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console

from reports.manifest import CampaignManifest, State, plain, utc_now, versions
from reports.store import Folder
from shortv.errors import Refused
from shortv.evals.scoring import ScoredSample
from shortv.terminal import console as default_console
from shortv.terminal import say
from shortv.workers.campaign.cells import Cell, CellRecord, CellResult, CellState, RunCell
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, resolve_plans
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.summary import print_summary, result_line
from shortv.workers.campaign.tables import TableBuilder
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

if TYPE_CHECKING:
    from shortv.workers.campaign.runner import ReplicaRunner


def run_campaign(spec: CampaignSpec, *, runner: ReplicaRunner, console: Console | None = None) -> int:
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
        campaign = _Campaign(spec, runner, CampaignFolder(folder), console)
        with one_driver(folder):
            worked = campaign.run()
            campaign.report()
            write_report(folder, console, anew=worked)
            return campaign.exit_status()


class _Campaign:
    """The cells of a spec, ordered by model, then by task, then by plan; and the records of those that are finished.

    `distinct` holds a cell for each key: cells that share a key run once.
    """

    def __init__(self, spec: CampaignSpec, runner: ReplicaRunner, folder: CampaignFolder, console: Console) -> None:
        """Read models, plans and tasks. Raises Refused where one cannot be right, ShortVError for a task's data."""
        self.spec, self.runner, self.folder, self.console = spec, runner, folder, console
        self.models = [self._model(name) for name in spec.models]
        self.entries, warnings = resolve_plans(spec.plans, self.models)
        self.tasks = [runner.task(name, spec) for name in spec.tasks]
        for warning in warnings:
            say(console, f"Warning: {warning}")
        self.cells = [
            Cell.of(spec, model, entry, task)
            for model in self.models
            for task in self.tasks
            for entry in self.entries[model.name]
        ]
        self.distinct: dict[str, Cell] = {}
        for cell in self.cells:
            self.distinct.setdefault(cell.key, cell)
        self.tables = TableBuilder(self.cells, folder, seed=spec.seed)
        self.records: dict[str, CellRecord] = {}

    def _model(self, name: str) -> ModelFacts:
        model = self.runner.loader.pin(self.spec.of_model(name))
        architecture = self.runner.loader.describe(model)
        return ModelFacts(name=name, revision=model.revision, digest=folder_digest(name), architecture=architecture)

    def run(self) -> bool:
        """Run the cells that are missing and return True; a finished campaign of the same spec is not changed."""
        folder = self.folder.folder
        before = find_manifest(folder, CampaignManifest)
        self.records, damaged = self.folder.read_records(self.distinct)
        for line in damaged:
            say(self.console, f"Warning: {line}; the cell runs again")
        pending = [cell for key, cell in self.distinct.items() if not self._is_finished(self.records.get(key))]
        say(self.console, f"{len(self.distinct)} cells, {len(self.distinct) - len(pending)} finished")
        wanted = self._manifest(before)
        if not pending and _is_repeated(before, wanted) and self.folder.has_tables():
            return False
        folder.check_writable()
        attempt(folder, wanted, lambda running: self._run_cells(running, pending))
        return True

    def _is_finished(self, record: CellRecord | None) -> bool:
        return record is not None and (record.state is CellState.COMPLETE or not self.spec.retry_failed)

    def report(self) -> None:
        """Print the tables and the failures."""
        print_summary(self.cells, self.records, self.tables.build(self.records), self.console)
        say(self.console, f"results in {self.folder.folder.shown}")

    def exit_status(self) -> int:
        """Return 0 when no cell lacks more than the tolerated share of its samples, else 3."""
        failed = [(1, 1) if one.state is CellState.FAILED else (one.errors, one.n) for one in self.records.values()]
        return max(exit_status(errors, total, self.spec.fail_on_error) for errors, total in failed)

    def _run_cells(self, running: CampaignManifest, pending: Sequence[Cell]) -> CampaignManifest:
        """Run cells model by model, and return the final manifest."""
        for _, cells in groupby(pending, key=lambda cell: cell.model.name):
            self._run_model(list(cells))
        self.folder.write_tables(self.tables.build(self.records))
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
        model = self.spec.of_model(cells[0].model.name).model_copy(update={"revision": cells[0].model.revision})
        plans = {cell.entry.name: cell.plan for cell in cells if cell.plan is not None}
        with ExitStack() as stack:
            try:
                run_cell = stack.enter_context(self.runner.open(model, tuple(plans.values()), self.spec))
            except (Stopped, Refused):
                raise
            except Exception as error:  # without replicas of this model, only its own cells fail
                for cell in cells:
                    self._commit(cell, CellRecord.of(cell, error, started=utc_now(), wall_seconds=0.0))
                return
            for cell in cells:
                self._run_cell(run_cell, cell)

    def _run_cell(self, run_cell: RunCell, cell: Cell) -> None:
        started, clock = utc_now(), time.monotonic()
        samples: Sequence[ScoredSample] = ()
        outcome: CellResult | Exception
        try:
            outcome = run_cell(cell.plan, cell.task.name)
            samples = outcome.scored.samples
        except Stopped:
            raise
        except Exception as error:  # tasks and judges run third-party code; its errors are failures of the cell
            outcome = error
        record = CellRecord.of(cell, outcome, started=started, wall_seconds=time.monotonic() - clock)
        self._commit(cell, record, samples)

    def _commit(self, cell: Cell, record: CellRecord, samples: Sequence[ScoredSample] = ()) -> None:
        """Write the cell and all tables. A retry that failed does not replace the samples of an earlier run."""
        before = self.records.get(cell.key)
        if record.state is CellState.FAILED and before is not None and before.state is not CellState.FAILED:
            say(self.console, f"{cell.shown}: the retry failed, the earlier answers stay: {record.message}")
            return
        self.records[cell.key] = self.folder.commit(cell, record, samples)
        self.folder.write_tables(self.tables.build(self.records))
        say(self.console, f"[{len(self.records)}/{len(self.distinct)}] {cell.shown}: {result_line(cell, record)}")

    def _manifest(self, before: CampaignManifest | None) -> CampaignManifest:
        """Return the manifest with which this run starts. It adds to the attempts and the time of an earlier run."""
        return CampaignManifest(
            state=State.RUNNING,
            arguments=self.spec.arguments(),
            versions=versions(),
            models=tuple({**asdict(model), "config_digest": model.architecture.config_digest} for model in self.models),
            plans=tuple(_plan_facts(model.name, entry) for model in self.models for entry in self.entries[model.name]),
            tasks=tuple(task._asdict() for task in self.tasks),
            seed=self.spec.seed,
            attempts=before.attempts if before else 0,
            started=before.started if before else utc_now(),
            wall_seconds=before.wall_seconds if before else None,
        )


def _is_repeated(before: CampaignManifest | None, wanted: CampaignManifest) -> bool:
    """Whether an earlier run with the same settings, models, plans, tasks and versions came to its end."""
    if before is None or before.state is State.RUNNING:
        return False
    return before == wanted.updated(state=before.state, counts=before.counts, finished=before.finished)


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
