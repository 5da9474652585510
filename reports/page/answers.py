"""The answers of a campaign's cells: why samples failed, after which layers visual tokens left, what is missing."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from reports.manifest import CampaignManifest
from reports.store import Folder
from shortv.errors import ShortVError

# The kind of a document without a kind, and of all kinds together.
ALL_KINDS: Final = "all"


class Exits(NamedTuple):
    """After which layers visual tokens left in one cell, for one kind of document.

    `counts` are samples by layer; the key `num_layers` means that they never left.
    """

    cell: str
    model: str
    task: str
    plan: str
    kind: str
    num_layers: int
    counts: Mapping[int, int]

    @property
    def samples(self) -> int:
        """Samples with visual tokens that were answered."""
        return sum(self.counts.values())


def deciding_plans(manifest: CampaignManifest) -> dict[tuple[str, str], int]:
    """Return the plans, by model and name, that decide for each sample where visual tokens leave: how many layers."""
    return {(plan["model"], plan["name"]): len(plan["modes"]) for plan in manifest.plans if _decides(plan)}


def _decides(plan: Mapping[str, Any]) -> bool:
    parts = plan.get("parts")
    return isinstance(parts, Mapping) and parts.get("threshold") is not None


def exits_of(cell: Mapping[str, Any], answers: pa.Table, num_layers: int) -> list[Exits]:
    """Count the exit layers in the answers of a cell: those of all samples first, then of each kind of question."""
    found: dict[str, Counter[int]] = {ALL_KINDS: Counter()}
    for row in answers.select(["kind", "exit_layer"]).to_pylist():
        if row["exit_layer"] is not None:
            found[ALL_KINDS][row["exit_layer"]] += 1
            if row["kind"] is not None:
                found.setdefault(row["kind"], Counter())[row["exit_layer"]] += 1
    names = (cell["cell"], cell["model"], cell["task"], cell["plan"])
    ordered = [ALL_KINDS, *sorted(found.keys() - {ALL_KINDS})]
    return [Exits(*names, kind, num_layers, found[kind]) for kind in ordered if found[kind]]


_LONGEST_REASON: Final = 300
_MOST_NAMED: Final = 5
MISSING: Final = "are missing"
UNREADABLE: Final = "cannot be read"
SHORT: Final = "have fewer samples than their cells"


class Failures(NamedTuple):
    """How many samples of a cell failed for one reason."""

    model: str
    plan: str
    task: str
    reason: str
    samples: int


class Answers(NamedTuple):
    """Why samples failed, after which layers visual tokens left, and which answers are missing, a line each."""

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
        # A plan with the modes of another one has no answers of its own, and a cell without results has none.
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
    # One changed byte can leave the file readable but its text invalid UTF-8.
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
        f"The answers of {cells} {what}: {', '.join(names[:_MOST_NAMED])}{more}. Errors and exit layers come from the "
        "answers and are incomplete on this page; run the command of this campaign again to compute these cells."
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
