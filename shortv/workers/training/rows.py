"""One step as the table `training` holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

TABLE = "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """A finished step, counted from 1; `metrics` are those beside the loss."""

    step: int
    samples: int
    loss: float
    learning_rate: float | None
    samples_per_second: float | None
    seconds: float
    metrics: Mapping[str, float]


def to_rows(rows: Sequence[StepRow]) -> list[dict[str, Any]]:
    """Rows as the table's columns."""
    return [
        {
            **{name: getattr(row, name) for name in StepRow.__slots__ if name != "metrics"},
            "metrics": [{"metric": name, "value": value} for name, value in row.metrics.items()],
        }
        for row in rows
    ]


def from_table(table: pa.Table) -> list[StepRow]:
    """The same rows, read back."""
    return [
        StepRow(**{**row, "metrics": {entry["metric"]: entry["value"] for entry in row["metrics"]}})
        for row in table.to_pylist()
    ]
