"""The driver of a campaign: checks, runs the cells that are missing, commits each, and tells what came of all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from rich.console import Console

from reports.manifest import utc_now
from shortv.errors import Refused, ShortVError
from shortv.plan import Plan
from shortv.workers.campaign.cells import Cell
from shortv.workers.campaign.folder import CampaignFolder, open_campaign
from shortv.workers.campaign.outcome import failed_record, record_of
from shortv.workers.campaign.plans import Kind
from shortv.workers.campaign.prepare import Prepared, describe_run, final_manifest, prepare
from shortv.workers.campaign.record import CellRecord, CellState
from shortv.workers.campaign.results import RunCell, Runner
from shortv.workers.campaign.scores import Scores
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.summary import main_metric, print_summary
from shortv.workers.campaign.tables import build_tables
from shortv.workers.page import write_report
from shortv.workers.stopping import Stopped, stop_on_signal

PARTIAL_STATUS = 3


def run_campaign(recipe: CampaignSpec, *, runner: Runner, console: Console | None = None) -> int:
    """Run, continue or repeat a campaign, print its tables, and return the exit status (0, or 3 with failures).

    Raises:
        Refused: the recipe cannot be right; nothing was started.
        ShortVError: the work was stopped or results cannot be written; the same command continues it.
    """
    console = console or wide_console()
    with stop_on_signal():
        prepared = prepare(recipe, runner)
        for warning in prepared.warnings:
            _say(console, f"Warning: {warning}")
        with open_campaign(recipe.output_path) as folder:
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
        self.scores = Scores(self.folder, seed=self.prepared.recipe.seed)

    def run(self) -> bool:
        """Run what is missing and return True; a finished campaign of the same recipe is left as it is."""
        started = time.monotonic()
        before = self.folder.manifest()
        found = self.folder.find(self.prepared.cells)
        self.records = found.records
        for line in found.damaged:
            _say(self.console, f"Warning: {line}")
        pending = self._pending()
        keys = {cell.key for cell in self.prepared.cells}
        _say(self.console, f"{len(keys)} cells, {len(keys) - len(pending)} finished")
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
        _say(self.console, f"results in {self.folder.folder.shown}")
        tolerated = self.prepared.recipe.fail_on_error
        shares = [
            1.0 if record.state is CellState.FAILED else record.errors / max(record.n, 1)
            for record in self.records.values()
        ]
        return PARTIAL_STATUS if any(share > tolerated for share in shares) else 0

    def _pending(self) -> list[Cell]:
        """The cells to run, one for all that share a key."""
        retry = self.prepared.recipe.retry_failed
        first = {cell.key: cell for cell in reversed(self.prepared.cells)}
        distinct = [cell for cell in self.prepared.cells if first[cell.key] is cell]
        return [cell for cell in distinct if _is_pending(self.records.get(cell.key), retry)]

    def _run_model(self, cells: Sequence[Cell]) -> None:
        plans = {cell.entry.name: cell.entry.plan for cell in cells if cell.entry.kind is not Kind.FULL}
        with ExitStack() as stack:
            try:
                model = cells[0].model
                recipe = self.prepared.recipe.model_copy(update={"revision": model.revision})
                opened = self.runner.open(model.name, tuple(plans.values()), recipe)
                run_cell = stack.enter_context(opened)
            except (Stopped, Refused):
                raise
            except ShortVError as error:
                for cell in cells:
                    self._commit(cell, failed_record(cell, str(error), utc_now(), 0.0))
                return
            for cell in cells:
                self._run_cell(run_cell, cell)

    def _run_cell(self, run_cell: RunCell, cell: Cell) -> None:
        started, clock = utc_now(), time.monotonic()
        plan: Plan | None = None if cell.entry.kind is Kind.FULL else cell.entry.plan
        try:
            result = run_cell(plan, cell.task.name)
            record = record_of(cell, result, started, time.monotonic() - clock)
        except Stopped:
            raise
        except ShortVError as error:
            self._commit(cell, failed_record(cell, str(error), started, time.monotonic() - clock))
            return
        if not self._keeps_old(cell, record):
            record = self.folder.write_answers(cell, result.samples, record)
        self._commit(cell, record)

    def _commit(self, cell: Cell, record: CellRecord) -> None:
        """Write the record and the tables. A retry that failed altogether does not undo what was there."""
        if self._keeps_old(cell, record):
            _say(self.console, f"{cell.shown}: the retry failed, the earlier answers stay: {record.message}")
            return
        self.folder.write_record(record)
        self.records[cell.key] = record
        self._write_tables()
        keys = list(dict.fromkeys(one.key for one in self.prepared.cells))
        done = sum(key in self.records for key in keys)
        _say(self.console, f"[{done}/{len(keys)}] {cell.shown}: {self._outcome(cell, record)}")

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


def wide_console() -> Console:
    """The terminal, or for a log file as wide a page as the tables need."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _is_pending(record: CellRecord | None, retry: bool) -> bool:
    return record is None or (retry and record.state is not CellState.COMPLETE)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
