"""How many questions a task needs to show a loss, from how far the scores of plans in a campaign differ."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reports.manifest import CampaignManifest
from reports.significance import Paired
from reports.store import Folder
from shortv.errors import Refused
from shortv.terminal import printable, say

_COLUMNS = ("questions", "differ", "sd", "to full", "needed", "smallest loss seen")


def print_power(folder: Folder, loss: float, console: Console) -> None:
    """Print, for each plan of a campaign against the full model, the questions that show a loss of the main metric.

    Raises:
        Refused: the folder is not a campaign's, or no plan is compared in it yet.
        ShortVError: its tables cannot be read.
    """
    CampaignManifest.load(folder)
    found = folder.read_table("comparisons").to_pylist() if folder.exists("comparisons.parquet") else []
    rows = [
        row
        for row in found
        if (row["family"], row["against"], row["subset"]) == ("main", "full", "all") and row["sd"] is not None
    ]
    if not rows:
        raise Refused(f"{folder.shown} compares no plan with the full model yet; run the campaign with a plan first")
    for (model, task, metric), plans in groupby(rows, key=lambda row: (row["model"], row["task"], row["metric"])):
        table = Table(
            title=escape(printable(f"{model} on {task}, {metric}")), title_justify="left", box=SIMPLE_HEAD, expand=False
        )
        table.add_column("plan", no_wrap=True)
        for name in _COLUMNS:
            table.add_column(f"needed for {loss:g}" if name == "needed" else name, justify="right")
        for row in plans:
            table.add_row(escape(printable(row["plan"])), *_cells(row, loss))
        console.print(table)
    say(
        console,
        f"needed: questions that show a loss of {loss:g} with a power of 80 % in a paired two-sided test at 5 %, for a "
        "plan that changes as many scores; smallest loss seen: with the questions that are there.",
    )


def _cells(row: Mapping[str, Any], loss: float) -> tuple[str, ...]:
    paired = Paired(**{name: row[name] for name in Paired._fields})
    return (
        f"{paired.n:,}",
        f"{paired.discordant:.1%}",
        f"{paired.sd:.3f}",
        f"{paired.difference:+.4f}",
        f"{paired.questions_needed(loss):,}",
        f"{paired.smallest_loss():.4f}",
    )
