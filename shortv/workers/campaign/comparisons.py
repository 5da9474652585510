"""Plans compared with the full model and with random controls: on all questions, on hard ones, and corrected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.comparing import Side, compare, hard_docs
from reports.significance import corrected
from shortv.workers.campaign.cells import Cell, Group
from shortv.workers.campaign.plans import FULL, PlanKind

ALL: Final = "all"
HARD: Final = "hard"
MAIN: Final = "main"

Sides = Mapping[str, Mapping[str, Side]]
"""One side of comparisons for each metric of each cell, by the cell's key."""


def comparisons(group: Group, sides: Sides, *, seed: int) -> list[dict[str, Any]]:
    """Compare plans with the full model, and those that are not controls with the mean of their random controls too.

    Each comparison is on all questions, and where the recipe has a downsampled control also on the hard ones.
    """
    main = group.task.main_metric or next(iter(sides[group.cells[0].key]), None)
    subsets: dict[str, NDArray[np.int32] | None] = {ALL: None}
    if main is not None:
        subsets |= _hard(group, sides, main)
    return [
        row | {"subset": subset, "family": MAIN if row["metric"] == main else row["metric"]}
        for cell in group.cells
        for subset, among in subsets.items()
        if subset == ALL or cell.entry.kind is not PlanKind.DOWNSAMPLE
        for row in _comparisons_of(cell, group, sides, among, seed)
    ]


def _hard(group: Group, sides: Sides, main: str) -> dict[str, NDArray[np.int32]]:
    """Return the questions that the first downsampled control of the recipe gets wrong."""
    scored = {key: found[main] for key, found in sides.items() if main in found}
    control = next((cell.key for cell in group.cells if cell.entry.kind is PlanKind.DOWNSAMPLE), None)
    if control is None or control not in scored:
        return {}
    known = np.concatenate([side.values for side in scored.values()])
    return {HARD: hard_docs(scored[control], best=float(np.nanmax(known, initial=-np.inf)))}


def _comparisons_of(
    cell: Cell, group: Group, sides: Sides, among: NDArray[np.int32] | None, seed: int
) -> Iterator[dict[str, Any]]:
    if cell.entry.kind is PlanKind.FULL:
        return
    controls = [other for other in group.cells if other.entry.is_control_of(cell.entry)]
    mean = f"mean of {len(controls)} random control{'s' * (len(controls) != 1)}"
    for others, against in ((group.cells[:1], FULL), (controls, mean)):
        for metric, own in sorted(sides[cell.key].items()) if others else ():
            found = [side for other in others if (side := sides[other.key].get(metric)) is not None]
            comparison = compare(own, found, among=among, seed=seed) if len(found) == len(others) else None
            if comparison is not None and math.isfinite(comparison.difference):
                yield cell.names | {"metric": metric, "against": against} | asdict(comparison)


def with_corrections(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons of a whole campaign with corrected p-values.

    Corrected together are those of one family against one side on one subset: the main metrics of all tasks, or any
    other metric, of all models, plans and tasks. A plan that is another name of one counts once.
    """
    first = {_which(row): row for row in reversed(rows)}
    families = [(row["family"], row["against"] == FULL, row["subset"]) for row in first.values()]
    found = corrected([row["p_value"] for row in first.values()], families)
    by_row = dict(zip(first, found, strict=True))
    return [{**row, **by_row[_which(row)]._asdict()} for row in rows]


def _which(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["cell"], row["metric"], row["against"], row["subset"]


def sides_of(answers: pa.Table) -> dict[str, Side]:
    """Return one side of a comparison for every metric in an answers table."""
    docs = answers["doc"].to_numpy()
    # Only equality matters, and texts may be long.
    numbers = np.array([hash(text) for text in answers["prediction"].to_pylist()], dtype=np.int64)
    scores = answers["scores"].combine_chunks()
    rows, pairs = pc.list_parent_indices(scores), pc.list_flatten(scores)
    flat = pa.table({"row": rows, "metric": pairs.field("metric"), "value": pairs.field("value")})
    found = {}
    for metric in flat["metric"].unique().to_pylist():
        own = flat.filter(pc.equal(flat["metric"], metric))
        column = np.full(len(docs), np.nan)
        column[own["row"].to_numpy()] = own["value"].to_numpy()
        found[metric] = Side(docs=docs, values=column, answers=numbers)
    return found
