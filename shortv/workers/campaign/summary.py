"""The output of a campaign: a table for each model and task, conclusions about the plans, and the failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shortv.terminal import printable, say
from shortv.workers.campaign.cells import Cell, CellRecord, CellState
from shortv.workers.campaign.plans import FULL
from shortv.workers.campaign.tables import Row, same_group

Tables = Mapping[str, Sequence[Row]]
_LEARNED: Final = ("learned", "trained")


def print_summary(cells: Sequence[Cell], records: Mapping[str, CellRecord], tables: Tables, console: Console) -> None:
    """Print a table and conclusions for each model and task, then the list of failures."""
    shown = set()
    for cell in cells:
        if (cell.model.name, cell.task.name) not in shown:
            shown.add((cell.model.name, cell.task.name))
            _print_group(same_group(cell, cells), records, tables, console)
    failures = list_failures(cells, records)
    if failures:
        console.print(f"[bold]{len(failures)} cell{'s' * (len(failures) != 1)} with failures[/bold]", highlight=False)
        for line in failures:
            say(console, f"  {line}")


def list_failures(cells: Sequence[Cell], records: Mapping[str, CellRecord]) -> list[str]:
    """Return a line for every cell that failed or lacks samples."""
    own = (cell for cell in cells if cell.entry.same_as is None)
    found = ((cell, records[cell.key]) for cell in own if cell.key in records)
    return [f"{cell.shown}: {record.message}" for cell, record in found if record.state is not CellState.COMPLETE]


def result_line(cell: Cell, record: CellRecord) -> str:
    """Return the result of a cell in a few words."""
    if record.state is CellState.FAILED:
        return f"failed: {record.message}"
    name = main_metric([cell], {cell.key: record})
    value = next((found.value for found in record.metrics if found.metric == name), None)
    score = f"{name} {value:.4f}, " if value is not None else ""
    errors = f", {record.errors} failed" if record.errors else ""
    return f"{score}{record.n} samples in {record.wall_seconds:.1f} s{errors}"


def main_metric(cells: Sequence[Cell], records: Mapping[str, CellRecord]) -> str | None:
    """Return the metric in the table of a task: the main metric of the task, else the first of a cell."""
    named = cells[0].task.main_metric
    found = (metric.metric for cell in cells if cell.key in records for metric in records[cell.key].metrics)
    return named or next(found, None)


def _print_group(cells: Sequence[Cell], records: Mapping[str, CellRecord], tables: Tables, console: Console) -> None:
    metric = main_metric(cells, records)
    title = escape(printable(f"{cells[0].model.name} on {cells[0].task.name}"))
    learned = any(cell.entry.training for cell in cells)
    # With the two columns about learning, the table fits into 110 characters.
    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 0 if learned else 1, 0, 0),
        show_edge=not learned,
    )
    table.add_column("plan", no_wrap=True)
    names = (
        "FLOPs",
        escape(printable(metric or "score")),
        "to full (95 % interval)",
        "changed",
        "prefill",
        "samples/s",
    )
    for name in (*names, *(_LEARNED if learned else ())):
        table.add_column(name, justify="right", no_wrap=name.startswith("to full"))
    full = records.get(cells[0].key)
    for cell in cells:
        row = _columns(cell, records.get(cell.key), full, metric, tables)
        table.add_row(cell.entry.name, *row, *(_learned(cell) if learned else ()))
    console.print(table)
    for line in _findings(cells, metric, tables):
        say(console, line)
    if learned:
        console.print()


def _columns(
    cell: Cell, record: CellRecord | None, full: CellRecord | None, metric: str | None, tables: Tables
) -> Iterator[str]:
    if record is None or record.state is CellState.FAILED:
        yield from ("", "not run" if record is None else "failed", "", "", "", "")
        return
    yield _text(record.speed.flops_ratio, ".1%")
    # A task may have one metric under several filters; the first filter of its configuration counts.
    yield _text(next((found.value for found in record.metrics if found.metric == metric), None), ".4f")
    row = _comparison(cell, metric, FULL, tables)
    yield _interval(row) if row else ""
    yield _text(row["share_changed"], ".1%") if row else ""
    own, base = record.speed.prefill_ms_median, full.speed.prefill_ms_median if full else None
    yield f"{own / base:.2f}" if own is not None and base else ""
    yield _text(record.speed.samples_per_second, ".1f")


def _learned(cell: Cell) -> Iterator[str]:
    """Yield the number of parameters of the plan's parts, and how long their training took."""
    parameters, seconds = cell.entry.training or (None, None)
    yield _text(parameters, ",")
    if seconds is None:
        yield ""
    else:
        yield f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _findings(cells: Sequence[Cell], metric: str | None, tables: Tables) -> Iterator[str]:
    for cell in cells:
        for row in tables["comparisons"]:
            if row["against"] != FULL and _is_of(row, cell) and row["metric"] == metric:
                yield f"{cell.entry.name} {_verdict(row)}: {_interval(row)} against the {row['against']}"
    for cell in cells:
        if cell.entry.same_as is not None:
            yield f"{cell.entry.name} is a tie with {cell.entry.same_as}: the same layers in the same modes, run once"


def _verdict(row: Row) -> str:
    if row["ci_low"] > 0:
        return "loses less than random"
    return "loses more than random" if row["ci_high"] < 0 else "is no better than random"


def _comparison(cell: Cell, metric: str | None, against: str, tables: Tables) -> Row | None:
    rows = (row for row in tables["comparisons"] if _is_of(row, cell))
    return next((row for row in rows if row["metric"] == metric and row["against"] == against), None)


def _is_of(row: Row, cell: Cell) -> bool:
    return (row["model"], row["task"], row["plan"]) == (cell.model.name, cell.task.name, cell.entry.name)


def _interval(row: Row) -> str:
    return f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
