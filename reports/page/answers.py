"""What a page takes from a campaign's answers, every file read once: failures, exit layers, and what is not there."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from reports.campaign import CampaignManifest
from reports.page.exit_data import Exits, deciding_plans, exits_of
from reports.store import Folder
from shortv.errors import ShortVError

_LONGEST_REASON: Final = 300
_MOST_NAMED: Final = 5
MISSING: Final = "are missing"
UNREADABLE: Final = "cannot be read"
SHORT: Final = "hold fewer samples than their cells"


class Failures(NamedTuple):
    """How many samples of a cell failed for one reason."""

    model: str
    plan: str
    task: str
    reason: str
    samples: int


class Answers(NamedTuple):
    """Why samples failed, after which layers visual tokens left, and which answers are not there, a line each."""

    failures: Sequence[Failures]
    exits: Sequence[Exits]
    problems: Sequence[str]


def read_answers(folder: Folder, manifest: CampaignManifest, cells: Sequence[Mapping[str, Any]]) -> Answers:
    """Read the answers of every cell; those that are missing or damaged become problems."""
    num_layers = deciding_plans(manifest)
    failures: list[Failures] = []
    exits: list[Exits] = []
    broken: dict[str, list[str]] = {MISSING: [], UNREADABLE: [], SHORT: []}
    for cell in cells:
        # A plan of the same modes as another has no answers of its own, and a cell that gave no result has none.
        if cell["same_as"] is not None or not cell["n"]:
            continue
        table, problem = _table(folder, answers_of(cell["cell"]), cell["n"])
        if problem is not None:
            broken[problem].append(_shown(cell, manifest))
        failures += _failures(cell, table)
        if table is not None and (cell["model"], cell["plan"]) in num_layers:
            exits += exits_of(cell, table, num_layers[cell["model"], cell["plan"]])
    return Answers(failures, exits, [_line(what, names) for what, names in broken.items() if names])


def answers_of(cell: str) -> str:
    """Return the name of the file with a cell's answers."""
    return f"answers/{cell}.parquet"


def _table(folder: Folder, name: str, samples: int) -> tuple[pa.Table | None, str | None]:
    try:
        if not folder.exists(name):
            return None, MISSING
        table = folder.read_table(name).select(["kind", "exit_layer", "error"])
        table.validate(full=True)
    # A changed byte may leave the file readable, and names or texts in it that are no UTF-8.
    except (ShortVError, UnicodeDecodeError, pa.ArrowInvalid):
        return None, UNREADABLE
    return table, SHORT if len(table) < samples else None


def _failures(cell: Mapping[str, Any], table: pa.Table | None) -> Iterator[Failures]:
    names = (cell["model"], cell["plan"], cell["task"])
    if table is None:
        if cell["errors"]:
            yield Failures(*names, _cut(cell["message"] or "no reason was recorded"), cell["errors"])
        return
    for reason, count in Counter(map(_cut, table["error"].drop_null().to_pylist())).most_common():
        yield Failures(*names, reason, count)


def _shown(cell: Mapping[str, Any], manifest: CampaignManifest) -> str:
    model = f"{cell['model']} under " if len(manifest.models) > 1 else ""
    return f"{model}{cell['plan']} on {cell['task']}"


def _line(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    cells = "1 cell" if len(names) == 1 else f"{len(names)} cells"
    return (
        f"The answers of {cells} {what}: {', '.join(names[:_MOST_NAMED])}{more}. What the page takes from answers, "
        "errors and exit layers, is incomplete here; the command of this campaign, run again, asks these cells anew."
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
