"""The per-sample scores of finished cells, read from their answers and kept for the next comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.comparing import Comparison, Side, compare
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.record import CellRecord


class Scores:
    """Compares cells, each pair once for as long as their answers stay what they are."""

    def __init__(self, folder: CampaignFolder, *, seed: int) -> None:
        """Read answers from `folder`; `seed` is that of the bootstrap resamples."""
        self._folder = folder
        self._seed = seed
        self._sides: dict[str, Mapping[str, Side]] = {}
        self._compared: dict[tuple[str, ...], Comparison | None] = {}

    def metrics(self, record: CellRecord) -> list[str]:
        """Names of the metrics for which samples of a cell have scores, in alphabetical order."""
        return sorted(self._of(record))

    def compare(self, record: CellRecord, against: Sequence[CellRecord], metric: str) -> Comparison | None:
        """Compare a cell with another, or with the mean of several; None when no sample has a score in all."""
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
