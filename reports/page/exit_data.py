"""After which layers the visual tokens of a campaign's samples left, for plans that decide it for each sample."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import pyarrow as pa

from reports.campaign import CampaignManifest

# What stands for a question without a kind, and for all kinds together.
ALL_KINDS: Final = "all"


class Exits(NamedTuple):
    """How the samples of one kind left in one cell: `counts` by layer, of which `num_layers` stands for never."""

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
