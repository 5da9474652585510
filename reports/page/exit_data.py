"""After which layers the visual tokens of a campaign's samples left, for plans that decide it for each sample."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from reports.campaign import CampaignManifest
from reports.store import Folder

# What stands for a question without a kind, and for all kinds together.
ALL_KINDS: Final = "all"


class Exits(NamedTuple):
    """How the samples of one kind left in one cell: `counts` by layer, of which `num_layers` stands for never."""

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


def read_exits(folder: Folder, manifest: CampaignManifest, cells: Sequence[Mapping[str, Any]]) -> list[Exits]:
    """Read the exit layers of every cell whose plan decides them. Raises ShortVError for damaged answers."""
    deciding = {(plan["model"], plan["name"]): len(plan["modes"]) for plan in manifest.plans if _decides(plan)}
    return [
        exits
        for cell in cells
        if (num_layers := deciding.get((cell["model"], cell["plan"]))) and cell["same_as"] is None
        for exits in _exits(folder, cell, num_layers)
    ]


def _decides(plan: Mapping[str, Any]) -> bool:
    parts = plan.get("parts")
    return isinstance(parts, Mapping) and parts.get("threshold") is not None


def _exits(folder: Folder, cell: Mapping[str, Any], num_layers: int) -> list[Exits]:
    answers = f"answers/{cell['cell']}.parquet"
    # A cell that failed altogether has none.
    if not folder.exists(answers):
        return []
    found: dict[str, Counter[int]] = {ALL_KINDS: Counter()}
    for row in folder.read_table(answers).select(["kind", "exit_layer"]).to_pylist():
        if row["exit_layer"] is not None:
            found[ALL_KINDS][row["exit_layer"]] += 1
            if row["kind"] is not None:
                found.setdefault(row["kind"], Counter())[row["exit_layer"]] += 1
    names = (cell["model"], cell["task"], cell["plan"])
    ordered = [ALL_KINDS, *sorted(found.keys() - {ALL_KINDS})]
    return [Exits(*names, kind, num_layers, found[kind]) for kind in ordered if found[kind]]
