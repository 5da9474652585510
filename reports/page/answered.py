"""What all answers of a campaign say on its page: why documents failed, where visual tokens left, what is missing."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from reports.answers import MAX_DOCS, Answers
from reports.manifest import CampaignManifest
from reports.page.document import Row, cut
from reports.store import Folder

# The kind of a document without a kind, and of all kinds together.
ALL_KINDS: Final = "all"
NEVER: Final = "never"
OTHER_REASONS: Final = "further reasons, which the answers name"
# Every message may name its own document, and nobody reads more of them.
_MOST_REASONS: Final = 500
_MOST_NAMED: Final = 5

Counts = defaultdict[str, Counter[str]]
Exits = defaultdict[str, Counter[tuple[str, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the answers of all cells say.

    `failures` are `model`, `plan`, `task`, `reason` and the number of `samples`. `exits` are the `exits` of a cell
    after a layer (`layer_left`), for each `kind` of document and all together. `problems` tell what is missing, and
    `parts` are the files with the answers, `samples` of them in all.
    """

    failures: Sequence[Row] = ()
    exits: Sequence[Row] = ()
    problems: Sequence[str] = ()
    parts: Sequence[str] = ()
    samples: int = 0


def read_answered(folder: Folder, manifest: CampaignManifest, cells: Sequence[Row]) -> Answered:
    """Read the answers of a campaign part by part. Raises ShortVError when the store cannot be reached."""
    # A plan with the modes of another one has no answers of its own, and a cell without results has none.
    own = {cell["cell"]: cell for cell in cells if cell["same_as"] is None and cell["n"]}
    answers, samples, reasons, exits = Answers(folder), Counter[str](), Counts(Counter), Exits(Counter)
    # An earlier recipe may have asked more documents of a task.
    num_docs = {task.get("name"): task.get("num_docs") for task in manifest.tasks}
    for table in answers.scan(["cell", "task", "doc", "kind", "exit_layer", "error"]):
        for task in table["task"].unique().to_pylist():
            wanted = (pc.field("task") == task) & (pc.field("doc") < (num_docs.get(task) or MAX_DOCS))
            _count(table.filter(wanted), samples, reasons, exits)
    lacking = defaultdict[str, list[str]](list)
    failures: list[Row] = []
    for key, cell in own.items():
        if samples[key] < cell["n"]:
            model = f"{cell['model']} under " if len(manifest.models) > 1 else ""
            problem = "have fewer samples than their cells" if samples[key] else "are missing"
            lacking[problem].append(f"{model}{cell['plan']} on {cell['task']}")
        # Without its answers, the table of cells knows how many samples failed, and why the first one did.
        known = Counter({cut(cell["message"] or "no reason was recorded"): cell["errors"]})
        counts = reasons[key] if samples[key] else known
        names = {name: cell[name] for name in ("model", "plan", "task")}
        failures += [names | {"reason": reason, "samples": count} for reason, count in counts.most_common() if count]
    num_layers = {(plan["model"], plan["name"]): len(plan["modes"]) for plan in manifest.plans}
    return Answered(
        failures=failures,
        exits=[
            row
            for key, cell in own.items()
            for row in _exits(cell, exits[key], num_layers.get((cell["model"], cell["plan"]), 0))
        ],
        problems=[*_damage(answers), *(_said(*item) for item in lacking.items())],
        parts=answers.parts,
        samples=samples.total(),
    )


def _count(table: pa.Table, samples: Counter[str], reasons: Counts, exits: Exits) -> None:
    """Add the answers of one part to the numbers of samples, reasons and exits of each cell."""
    for row in table.group_by("cell").aggregate([([], "count_all")]).to_pylist():
        samples[row["cell"]] += row["count_all"]
    failed = table.filter(pc.is_valid(table["error"])).group_by(["cell", "error"])
    for row in failed.aggregate([([], "count_all")]).to_pylist():
        found, reason = reasons[row["cell"]], str(cut(row["error"]))
        found[reason if reason in found or len(found) < _MOST_REASONS else OTHER_REASONS] += row["count_all"]
    left = table.filter(pc.is_valid(table["exit_layer"])).group_by(["cell", "kind", "exit_layer"])
    for row in left.aggregate([([], "count_all")]).to_pylist():
        for kind in {ALL_KINDS, row["kind"] or ALL_KINDS}:
            exits[row["cell"]][kind, row["exit_layer"]] += row["count_all"]


def _damage(answers: Answers) -> list[str]:
    """Return one line about the parts that cannot be read."""
    if not answers.damaged:
        return []
    parts = f"{len(answers.damaged)} parts of the answers" if len(answers.damaged) > 1 else "A part of the answers"
    return [
        f"{parts} cannot be read, and what they hold is missing on this page: {next(iter(answers.damaged.values()))}"
    ]


def _said(problem: str, cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _MOST_NAMED} more" if len(cells) > _MOST_NAMED else ""
    return (
        f"The answers of {len(cells)} {'cell' if len(cells) == 1 else 'cells'} {problem}: "
        f"{', '.join(cells[:_MOST_NAMED])}{more}. Errors and exit layers come from the answers and are incomplete on "
        "this page; run the command of this campaign again to compute what is missing."
    )


def _exits(cell: Row, found: Mapping[tuple[str, int], int], num_layers: int) -> Iterator[Row]:
    """Yield how many samples' visual tokens left after each layer, or never: of all samples, then of each kind."""
    names = {name: cell[name] for name in ("model", "plan", "task")}
    for kind in sorted({kind for kind, _ in found}, key=lambda kind: (kind != ALL_KINDS, kind)):
        samples = sum(count for (other, _), count in found.items() if other == kind)
        for layer in range(num_layers + 1):
            exits, left = found[kind, layer], NEVER if layer == num_layers else str(layer)
            counts = {"samples": samples, "layer_left": left, "exits": exits, "share": exits / samples}
            yield names | {"kind": kind} | counts
