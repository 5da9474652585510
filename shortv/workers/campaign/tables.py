"""The tables of a campaign, made from the records and answers of its finished cells, in the order of its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.comparing import Comparison, Side, compare
from shortv.workers.campaign.cells import Cell, CellRecord
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import FULL, PlanKind, Training

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]
Records = Mapping[str, CellRecord]


def same_group(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return all cells of the same model and task in order, including the cell itself; the first is the full model."""
    return [other for other in cells if other.model.name == cell.model.name and other.task.name == cell.task.name]


class TableBuilder:
    """Makes the tables of a campaign; answers are read, and cells compared, again only when the answers change."""

    def __init__(self, cells: Sequence[Cell], folder: CampaignFolder, *, seed: int) -> None:
        """Take the cells, the folder with their answers, and the seed of the bootstrap resamples."""
        self._cells = cells

        positions: dict[str, int] = {}

        # A record is named by its key and the digest of its answers.
        @cache
        def sides(key: str, digest: str) -> dict[str, Side]:
            return sides_of(folder.read_answers(key), positions)

        @cache
        def compared(metric: str, *names: tuple[str, str]) -> Comparison | None:
            found = [sides(*name).get(metric) for name in names]
            known = [side for side in found if side is not None]
            return compare(known[0], known[1:], seed=seed) if len(known) == len(found) else None

        self._sides, self._compared = sides, compared

    def build(self, records: Records) -> dict[str, list[Row]]:
        """Return the rows of every table. They do not depend on the order in which cells finished."""
        finished = [(cell, records[cell.key]) for cell in self._cells if cell.key in records]
        return {
            "cells": [_cell_row(cell, record) for cell, record in finished],
            "metrics": [row for cell, record in finished for row in _metric_rows(cell, record)],
            "comparisons": [row for cell, _ in finished for row in self._comparison_rows(cell, records)],
            "speed": [cell.names | record.speed.model_dump() for cell, record in finished],
        }

    def _comparison_rows(self, cell: Cell, records: Records) -> Iterator[Row]:
        """Compare with the full model, and a plan that is not a control with the mean of its random controls too."""
        own, group = _answers(cell, records), same_group(cell, self._cells)
        if cell.entry.kind is PlanKind.FULL or own is None:
            return
        controls = [other for other in group if other.entry.is_control_of(cell.entry)]
        full, random = ([one for other in some if (one := _answers(other, records))] for some in (group[:1], controls))
        mean = f"mean of {len(random)} random control{'s' * (len(random) != 1)}"
        names = {name: value for name, value in cell.names.items() if name != "cell"}
        for found, against in ((full, FULL), (random, mean)):
            for metric in sorted(self._sides(*own)) if found else ():
                comparison = self._compared(metric, own, *found)
                if comparison is not None and math.isfinite(comparison.difference):
                    yield names | {"metric": metric, "against": against} | asdict(comparison)


def _answers(cell: Cell, records: Records) -> tuple[str, str] | None:
    """Return the name of a cell's answers, None where it has none."""
    record = records.get(cell.key)
    return None if record is None or record.answers_digest is None else (cell.key, record.answers_digest)


def _cell_row(cell: Cell, record: CellRecord) -> Row:
    training = cell.entry.training or Training()
    same = ("state", "n", "errors", "message", "started", "finished", "wall_seconds")
    return {
        **cell.names,
        **{name: getattr(record, name) for name in same},
        "revision": cell.model.revision,
        "plan_digest": cell.entry.plan.digest,
        "same_as": cell.entry.same_as,
        "task_digest": cell.task.digest,
        "limit": cell.identity["limit"],
        "seed": cell.identity["seed"],
        "flops_ratio": record.speed.flops_ratio,
        "learned_parameters": training.parameters,
        "train_seconds": training.seconds,
    }


def _metric_rows(cell: Cell, record: CellRecord) -> Iterator[Row]:
    for metric in record.metrics:
        yield cell.names | {"plan_digest": cell.entry.plan.digest} | asdict(metric)


def sides_of(answers: pa.Table, positions: dict[str, int]) -> dict[str, Side]:
    """Return one side of a comparison for every metric in an answers table; new sample ids get a position."""
    ids = answers["sample_id"].to_pylist()
    docs = np.array([positions.setdefault(sample_id, len(positions)) for sample_id in ids], dtype=np.int32)
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
