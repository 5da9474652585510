"""The rows of a campaign's tables, in the order of its recipe, from the records of its finished cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from shortv.workers.campaign.cells import Cell
from shortv.workers.campaign.plans import Entry, Kind
from shortv.workers.campaign.record import CellRecord
from shortv.workers.campaign.scores import Scores

Row = Mapping[str, Any]
FULL: Final = "full"


def build_tables(cells: Sequence[Cell], records: Mapping[str, CellRecord], scores: Scores) -> dict[str, list[Row]]:
    """Return the rows of every table. A cell that is not finished has none; an order of finishing leaves no trace."""
    finished = [(cell, records[cell.key]) for cell in cells if cell.key in records]
    return {
        "cells": [_cell_row(cell, record) for cell, record in finished],
        "metrics": [row for cell, record in finished for row in _metric_rows(cell, record)],
        "comparisons": [row for cell, _ in finished for row in _comparison_rows(cell, cells, records, scores)],
        "speed": [_names(cell) | asdict(record.speed) for cell, record in finished],
    }


def mean_of_controls(count: int) -> str:
    """What `against` says for the mean of so many random controls."""
    return f"mean of {count} random control{'s' * (count != 1)}"


def controls_of(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the random controls that change as many layers in the same way, for a plan that is no control."""
    if cell.entry.kind is not Kind.PLAN:
        return []
    return [other for other in beside(cell, cells) if _is_control(other.entry, cell.entry)]


def beside(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """All cells of the same model and task, in order, the cell itself among them."""
    return [other for other in cells if other.model.name == cell.model.name and other.task.name == cell.task.name]


def _is_control(entry: Entry, plan: Entry) -> bool:
    return entry.kind is Kind.RANDOM and entry.size == plan.size and plan.plan.parts is None


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
        yield _names(cell) | {"plan_digest": cell.entry.plan.digest} | metric._asdict()


def _comparison_rows(
    cell: Cell, cells: Sequence[Cell], records: Mapping[str, CellRecord], scores: Scores
) -> Iterator[Row]:
    """Against the full model; and for a plan that is no control, against the mean of its random controls."""
    if cell.entry.kind is Kind.FULL:
        return
    own = records[cell.key]
    full = [other for other in beside(cell, cells) if other.entry.kind is Kind.FULL]
    controls = [other for other in controls_of(cell, cells) if _answered(records.get(other.key))]
    for others, against in ((full, FULL), (controls, mean_of_controls(len(controls)))):
        found = [records[other.key] for other in others if _answered(records.get(other.key))]
        for metric in scores.metrics(own) if found else ():
            comparison = scores.compare(own, found, metric)
            if comparison is not None and math.isfinite(comparison.difference):
                names = {name: value for name, value in _names(cell).items() if name != "cell"}
                yield names | {"metric": metric, "against": against} | asdict(comparison)


def _answered(record: CellRecord | None) -> bool:
    return record is not None and record.answers_digest is not None
