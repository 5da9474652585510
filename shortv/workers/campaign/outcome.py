"""What a cell's result, or the lack of one, means for its record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from reports.locations import one_line
from reports.manifest import utc_now
from shortv.errors import ShortVError
from shortv.evals.aggregation import MetricRow
from shortv.evals.scoring import Sample
from shortv.workers.campaign.cells import Cell
from shortv.workers.campaign.record import CellRecord, CellState, Speed, measure_speed
from shortv.workers.campaign.results import CellResult


def record_of(cell: Cell, result: CellResult, started: str, wall_seconds: float) -> CellRecord:
    """Return the record of a cell that ran, still without the digest of its answers.

    Raises:
        ShortVError: there is no sample, or one is there twice: what the cell holds cannot be trusted.
    """
    _check_samples(result.samples)
    errors = [sample for sample in result.samples if sample.error is not None]
    state = CellState.COMPLETE if not errors else CellState.PARTIAL
    return CellRecord(
        key=cell.key,
        identity=cell.identity,
        state=CellState.FAILED if result.problem or len(errors) == len(result.samples) else state,
        n=len(result.samples),
        errors=len(errors),
        message=result.problem or (_failed_samples(errors, len(result.samples)) if errors else None),
        answers_digest=None,
        metrics=tuple(_finite(metric) for metric in result.metrics),
        speed=measure_speed(cell, result, wall_seconds if result.seconds is None else result.seconds),
        started=started,
        finished=utc_now(),
        wall_seconds=wall_seconds,
    )


def failed_record(cell: Cell, message: str, started: str, wall_seconds: float) -> CellRecord:
    """Return the record of a cell that gave no result at all."""
    return CellRecord(
        key=cell.key,
        identity=cell.identity,
        state=CellState.FAILED,
        n=0,
        errors=0,
        message=one_line(ShortVError(message)),
        answers_digest=None,
        metrics=(),
        speed=Speed(),
        started=started,
        finished=utc_now(),
        wall_seconds=wall_seconds,
    )


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ShortVError("the task gave no sample; raise the limit, or check the data of the task")
    sample_id, times = Counter(sample.sample_id for sample in samples).most_common(1)[0]
    if times > 1:
        raise ShortVError(f"sample {sample_id!r} was answered {times} times; give the task's documents distinct ids")


def _failed_samples(errors: Sequence[Sample], total: int) -> str:
    first = min(errors, key=lambda sample: sample.sample_id)
    return (
        f"{len(errors)} of {total} samples failed; the first, {first.sample_id!r}: {one_line(Exception(first.error))}"
    )


def _finite(metric: MetricRow) -> MetricRow:
    """JSON has no NaN: a value that is no number is none."""
    unknown = {
        name for name, value in metric._asdict().items() if isinstance(value, float) and not math.isfinite(value)
    }
    return MetricRow(**{**metric._asdict(), **dict.fromkeys(unknown)})
