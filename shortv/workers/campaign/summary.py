"""The output of a campaign: a table for each model and task, conclusions about the plans, and the failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shortv.terminal import printable, say
from shortv.workers.campaign.cells import Cell, CellRecord, CellState
from shortv.workers.campaign.plans import FULL, Training
from shortv.workers.campaign.tables import Records, Row, Tables, same_group

_LEARNED: Final = ("learned", "trained")


def print_summary(cells: Sequence[Cell], records: Records, tables: Tables, console: Console) -> None:
    """Print a table and conclusions for each model and task, then the cells that failed or lack samples."""
    for cell in cells:
        group = same_group(cell, cells)
        if cell is group[0]:
            _print_group(group, records, tables, console)
    own = [cell for cell in cells if cell.entry.same_as is None and cell.key in records]
    failed = [cell for cell in own if records[cell.key].state is not CellState.COMPLETE]
    if failed:
        console.print(f"[bold]{len(failed)} cell{'s' * (len(failed) != 1)} with failures[/bold]", highlight=False)
    for cell in failed:
        say(console, f"  {cell.shown}: {records[cell.key].message}")


def result_line(cell: Cell, record: CellRecord) -> str:
    """Return the result of a cell in a few words."""
    if record.state is CellState.FAILED:
        return f"failed: {record.message}"
    name = _main_metric([cell], {cell.key: record})
    value = _value(record, name)
    score = f"{name} {value:.4f}, " if value is not None else ""
    errors = f", {record.errors} failed" if record.errors else ""
    return f"{score}{record.n} samples in {record.wall_seconds:.1f} s{errors}"


def _main_metric(cells: Sequence[Cell], records: Records) -> str | None:
    """Return the main metric of the cells' task, else the first metric of a cell."""
    found = (metric.metric for cell in cells if cell.key in records for metric in records[cell.key].metrics)
    return cells[0].task.main_metric or next(found, None)


def _value(record: CellRecord, metric: str | None) -> float | None:
    # A task may have one metric under several filters; the first filter of its configuration counts.
    return next((found.value for found in record.metrics if found.metric == metric), None)


def _print_group(cells: Sequence[Cell], records: Records, tables: Tables, console: Console) -> None:
    metric = _main_metric(cells, records)
    learned = any(cell.entry.training for cell in cells)
    # With the two columns about learning, the table fits into 110 characters.
    table = Table(
        title=escape(printable(f"{cells[0].model.name} on {cells[0].task.name}")),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 0 if learned else 1, 0, 0),
        show_edge=not learned,
    )
    table.add_column("plan", no_wrap=True)
    score = escape(printable(metric or "score"))
    names = ("FLOPs", score, "to full (95 % interval)", "changed", "prefill", "samples/s", *(_LEARNED * learned))
    for name in names:
        table.add_column(name, justify="right", no_wrap=name.startswith("to full"))
    compared = {_place(row): row for row in tables["comparisons"] if (row["metric"], row["against"]) == (metric, FULL)}
    full = records.get(cells[0].key)
    for cell in cells:
        row = _columns(records.get(cell.key), full, metric, compared.get(_place(cell.names)))
        table.add_row(cell.entry.name, *row, *(_learned(cell) if learned else ()))
    console.print(table)
    for line in _findings(cells, metric, tables):
        say(console, line)
    if learned:
        console.print()


def _columns(record: CellRecord | None, full: CellRecord | None, metric: str | None, row: Row | None) -> Iterator[str]:
    if record is None or record.state is CellState.FAILED:
        yield from ("", "not run" if record is None else "failed", "", "", "", "")
        return
    yield _text(record.speed.flops_ratio, ".1%")
    yield _text(_value(record, metric), ".4f")
    yield _interval(row) if row else ""
    yield _text(row["share_changed"], ".1%") if row else ""
    own, base = record.speed.prefill_ms_median, full.speed.prefill_ms_median if full else None
    yield f"{own / base:.2f}" if own is not None and base else ""
    yield _text(record.speed.samples_per_second, ".1f")


def _learned(cell: Cell) -> Iterator[str]:
    """Yield the number of parameters of the plan's parts, and how long their training took."""
    parameters, seconds = cell.entry.training or Training()
    yield _text(parameters, ",")
    if seconds is None:
        yield ""
    else:
        yield f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _findings(cells: Sequence[Cell], metric: str | None, tables: Tables) -> Iterator[str]:
    for cell in cells:
        for row in tables["comparisons"]:
            if row["against"] != FULL and row["metric"] == metric and _place(row) == _place(cell.names):
                better = "less" if row["ci_low"] > 0 else "more"
                decided = row["ci_low"] > 0 or row["ci_high"] < 0
                verdict = f"loses {better} than random" if decided else "is no better than random"
                yield f"{cell.entry.name} {verdict}: {_interval(row)} against the {row['against']}"
    for cell in cells:
        if cell.entry.same_as is not None:
            yield f"{cell.entry.name} is a tie with {cell.entry.same_as}: the same layers in the same modes, run once"


def _place(row: Row) -> tuple[str, str, str]:
    return row["model"], row["task"], row["plan"]


def _interval(row: Row) -> str:
    return f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
