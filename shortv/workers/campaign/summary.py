"""The output of a campaign: a table for each model and task, conclusions about the plans, and the failures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shortv.terminal import printable, say
from shortv.workers.campaign.cells import CellState, Group, names_of
from shortv.workers.campaign.comparisons import ALL, HARD
from shortv.workers.campaign.plans import FULL, PlanKind

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]

_LEARNED: Final = ("learned", "trained")


def print_summary(rows: Rows, groups: Sequence[Group], console: Console) -> None:
    """Print a table and conclusions for each model and task, then the cells that failed or lack samples."""
    for group in groups:
        _print_group(group, _of_group(rows, group), console)
    failed = [row for row in rows["cells"] if row["same_as"] is None and row["state"] != CellState.COMPLETE]
    if failed:
        console.print(f"[bold]{len(failed)} cell{'s' * (len(failed) != 1)} with failures[/bold]", highlight=False)
    for row in failed:
        say(console, f"  {_shown(row)}: {row['message']}")


def _of_group(rows: Rows, group: Group) -> Rows:
    wanted = group.model.name, group.task.name
    return {name: [row for row in some if names_of(row)[:2] == wanted] for name, some in rows.items()}


def result_line(row: Row, metrics: Sequence[Row], main_metric: str | None) -> str:
    """Return the result of a cell, a row of the table `cells`, in a few words."""
    if row["state"] == CellState.FAILED:
        return f"{_shown(row)}: failed: {row['message']}"
    own = [metric for metric in metrics if metric["plan"] == row["plan"]]
    name = main_metric or (own[0]["metric"] if own else None)
    value = _value(own, name)
    score = f"{name} {value:.4f}, " if value is not None else ""
    errors = f", {row['errors']} failed" if row["errors"] else ""
    return f"{_shown(row)}: {score}{row['n']} samples{errors}"


def _shown(row: Row) -> str:
    return f"{row['model']} {row['plan']} {row['task']}"


def _value(metrics: Sequence[Row], name: str | None) -> float | None:
    # A task may have one metric under several filters; the first filter of its configuration counts.
    return next((row["value"] for row in metrics if row["metric"] == name), None)


def _print_group(group: Group, rows: Rows, console: Console) -> None:
    metric = group.task.main_metric or next((row["metric"] for row in rows["metrics"]), None)
    learned = any(row["learned_parameters"] is not None for row in rows["cells"])
    # With the two columns about learning, the table fits into 120 characters.
    table = Table(
        title=escape(printable(f"{group.model.name} on {group.task.name}")),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 0 if learned else 1, 0, 0),
        show_edge=not learned,
    )
    table.add_column("plan", no_wrap=True)
    score = escape(printable(metric or "score"))
    names = (
        "FLOPs",
        score,
        "to full (95 % interval)",
        "p (Holm)",
        "changed",
        "prefill",
        "samples/s",
        *(_LEARNED * learned),
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=name.startswith("to full"))
    judged = [row for row in rows["comparisons"] if row["metric"] == metric]
    compared = {row["plan"]: row for row in judged if (row["against"], row["subset"]) == (FULL, ALL)}
    speeds = {row["plan"]: row for row in rows["speed"]}
    for row in rows["cells"]:
        plan = row["plan"]
        own = [found for found in rows["metrics"] if found["plan"] == plan]
        columns = _columns(row, speeds[plan], _value(own, metric), compared.get(plan))
        table.add_row(plan, *columns, *(_learned(row) if learned else ()))
    console.print(table)
    plans = {cell.entry.name for cell in group.cells if cell.entry.kind is PlanKind.PLAN}
    for line in _findings(rows, metric, plans):
        say(console, line)
    if learned:
        console.print()


def _columns(row: Row, speed: Row, value: float | None, compared: Row | None) -> Iterator[str]:
    if row["state"] == CellState.FAILED:
        yield from ("", "failed" if row["n"] else "not run", "", "", "", "", "")
        return
    yield _text(row["flops_ratio"], ".1%")
    yield _text(value, ".4f")
    yield _interval(compared) if compared else ""
    yield f"{_share(compared['p_value'])} ({_share(compared['p_holm'])})" if compared else ""
    yield _text(compared["share_changed"], ".1%") if compared else ""
    yield _text(speed["prefill_ratio"], ".2f")
    yield _text(speed["samples_per_second"], ".1f")


def _learned(row: Row) -> Iterator[str]:
    """Yield the number of parameters of the plan's parts, and how long their training took."""
    yield _text(row["learned_parameters"], ",")
    seconds = row["train_seconds"]
    if seconds is None:
        yield ""
    else:
        yield f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _findings(rows: Rows, metric: str | None, plans: Collection[str]) -> Iterator[str]:
    """Yield what the comparisons say of these plans, which are not controls."""
    judged = [row for row in rows["comparisons"] if row["metric"] == metric]
    for row in judged:
        if row["against"] != FULL and row["subset"] == ALL:
            better = "less" if row["ci_low"] > 0 else "more"
            decided = row["ci_low"] > 0 or row["ci_high"] < 0
            verdict = f"loses {better} than random" if decided else "is no better than random"
            yield f"{row['plan']} {verdict}: {_interval(row)} against the {row['against']}"
    for row in judged:
        if row["against"] == FULL and row["subset"] == HARD and row["plan"] in plans:
            hard = f"the {row['n']} questions that smaller images get wrong"
            yield f"{row['plan']} on {hard}: {_interval(row)} to full"
    for row in rows["cells"]:
        if row["same_as"] is not None:
            yield f"{row['plan']} is a tie with {row['same_as']}: the same layers in the same modes, run once"


def _interval(row: Row) -> str:
    return f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def _share(p_value: float) -> str:
    """Return a p-value without the zero in front."""
    return "<.001" if p_value < 0.001 else f"{p_value:.3f}".removeprefix("0").replace("1.000", "1")


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
