"""The tables of a campaign, made from the records and answers of its finished cells, in the order of its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.comparing import Comparison, Side, compare
from shortv.workers.campaign.cells import Cell, CellRecord
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import FULL, PlanEntry, PlanKind

Row = Mapping[str, Any]


def build_tables(cells: Sequence[Cell], records: Mapping[str, CellRecord], scores: Scores) -> dict[str, list[Row]]:
    """Return the rows of every table. They do not depend on the order in which cells finished."""
    finished = [(cell, records[cell.key]) for cell in cells if cell.key in records]
    return {
        "cells": [_cell_row(cell, record) for cell, record in finished],
        "metrics": [row for cell, record in finished for row in _metric_rows(cell, record)],
        "comparisons": [row for cell, _ in finished for row in _comparison_rows(cell, cells, records, scores)],
        "speed": [_names(cell) | record.speed.model_dump() for cell, record in finished],
    }


def mean_of_controls(count: int) -> str:
    """Return the value of `against` for the mean of `count` random controls."""
    return f"mean of {count} random control{'s' * (count != 1)}"


def controls_of(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of the random controls with as many layers in each mode; none for a cell that is a control."""
    if cell.entry.kind is not PlanKind.PLAN:
        return []
    return [other for other in same_group(cell, cells) if _is_control(other.entry, cell.entry)]


def same_group(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return all cells of the same model and task in order, including the cell itself."""
    return [other for other in cells if other.model.name == cell.model.name and other.task.name == cell.task.name]


def _is_control(entry: PlanEntry, plan: PlanEntry) -> bool:
    return entry.kind is PlanKind.RANDOM and entry.size == plan.size and plan.plan.parts is None


def _names(cell: Cell) -> dict[str, Any]:
    return {"cell": cell.key, "model": cell.model.name, "plan": cell.entry.name, "task": cell.task.name}


def _cell_row(cell: Cell, record: CellRecord) -> Row:
    training = cell.entry.training
    return _names(cell) | {
        "revision": cell.model.revision,
        "plan_digest": cell.entry.plan.digest,
        "same_as": cell.entry.same_as,
        "task_digest": cell.task.digest,
        "limit": cell.identity["limit"],
        "seed": cell.identity["seed"],
        "state": record.state,
        "n": record.n,
        "errors": record.errors,
        "message": record.message,
        "flops_ratio": record.speed.flops_ratio,
        "learned_parameters": training.parameters if training else None,
        "train_seconds": training.seconds if training else None,
        "started": record.started,
        "finished": record.finished,
        "wall_seconds": record.wall_seconds,
    }


def _metric_rows(cell: Cell, record: CellRecord) -> Iterator[Row]:
    for metric in record.metrics:
        yield _names(cell) | {"plan_digest": cell.entry.plan.digest} | asdict(metric)


def _comparison_rows(
    cell: Cell, cells: Sequence[Cell], records: Mapping[str, CellRecord], scores: Scores
) -> Iterator[Row]:
    """Compare with the full model, and a plan that is not a control with the mean of its random controls too."""
    if cell.entry.kind is PlanKind.FULL:
        return
    own = records[cell.key]
    full = [other for other in same_group(cell, cells) if other.entry.kind is PlanKind.FULL]
    controls = [other for other in controls_of(cell, cells) if _has_answers(records.get(other.key))]
    for others, against in ((full, FULL), (controls, mean_of_controls(len(controls)))):
        found = [records[other.key] for other in others if _has_answers(records.get(other.key))]
        for metric in scores.metrics(own) if found else ():
            comparison = scores.compare(own, found, metric)
            if comparison is not None and math.isfinite(comparison.difference):
                names = {name: value for name, value in _names(cell).items() if name != "cell"}
                yield names | {"metric": metric, "against": against} | asdict(comparison)


def _has_answers(record: CellRecord | None) -> bool:
    return record is not None and record.answers_digest is not None


class Scores:
    """Compares cells; each comparison is computed again only when answers change."""

    def __init__(self, folder: CampaignFolder, *, seed: int) -> None:
        """Read answers from `folder`; `seed` is that of the bootstrap resamples."""
        self._folder = folder
        self._seed = seed
        self._sides: dict[str, Mapping[str, Side]] = {}
        self._compared: dict[tuple[str, ...], Comparison | None] = {}

    def metrics(self, record: CellRecord) -> list[str]:
        """Return the metrics for which samples of a cell have scores, in alphabetical order."""
        return sorted(self._of(record))

    def compare(self, record: CellRecord, against: Sequence[CellRecord], metric: str) -> Comparison | None:
        """Compare a cell with another, or with the mean of several. Returns None if no sample has a score in all."""
        records = (record, *against)
        key = (metric, *(str(one.answers_digest) for one in records))
        if key not in self._compared:
            sides = [self._of(one).get(metric) for one in records]
            known = [side for side in sides if side is not None]
            whole = len(known) == len(sides)
            self._compared[key] = compare(known[0], known[1:], seed=self._seed) if whole else None
        return self._compared[key]

    def _of(self, record: CellRecord) -> Mapping[str, Side]:
        digest = record.answers_digest
        if digest is None:
            return {}
        if digest not in self._sides:
            self._sides[digest] = sides_of(self._folder.read_answers(record.key))
        return self._sides[digest]


def sides_of(answers: pa.Table) -> dict[str, Side]:
    """Return one side of a comparison for every metric in an answers table."""
    sample_ids = np.array(answers["sample_id"].to_pylist(), dtype=np.str_)
    texts = answers["prediction"].to_pylist()
    # Only equality matters, and texts may be long.
    numbers = np.array([hash(text) for text in texts], dtype=np.int64)
    scores = answers["scores"].combine_chunks()
    rows = pc.list_parent_indices(scores).to_numpy(zero_copy_only=False)
    pairs = pc.list_flatten(scores)
    names = np.array(pairs.field("metric").to_pylist(), dtype=object)
    values = _floats(pairs.field("value"))
    found = {}
    for metric in dict.fromkeys(names.tolist()):
        of_metric = names == metric
        column = np.full(len(sample_ids), np.nan)
        column[rows[of_metric]] = values[of_metric]
        found[metric] = Side(sample_ids=sample_ids, values=column, answers=numbers)
    return found


def _floats(column: Any) -> Any:
    return column.to_numpy(zero_copy_only=False).astype(np.float64)
