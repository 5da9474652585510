"""Calibration samples from Parquet files and lmms-eval tasks, read by the driver."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from reports.calibration import read_calibration
from reports.manifest import digest_of
from shortv.errors import Refused
from shortv.sample import Sample

_TEXT = {name: pa.string() for name in ("sample_id", "prompt", "answer", "dataset")}
SAMPLES_TYPE = pa.list_(pa.struct({**_TEXT, "images": pa.list_(pa.large_binary())}))
"""Samples on their way to workers."""


def resolve_calibration(
    sources: Sequence[str], *, limit: float | None, seed: int, include_path: str | None
) -> list[Sample]:
    """Read all sources in order.

    Args:
        sources: Parquet files (`PATH.parquet`, local or a URI) and tasks (`gqa:20`, or `gqa` with a limit).
        limit: samples per source, or below 1 a share of each file.

    Raises:
        Refused: no source, an unknown task, an unreadable or empty file, or a sample id that two sources share.
    """
    if not sources:
        raise Refused("no calibration samples are named; give --calibration FILE.parquet or --calibration TASK:NUMBER")
    samples: list[Sample] = []
    for source in sources:
        if source.endswith(".parquet") or "/" in source:
            samples += _limited(read_calibration(source), limit)
        else:
            samples += _task(source, limit, seed, include_path)
    counts = Counter(sample.sample_id for sample in samples)
    repeated = [sample_id for sample_id, count in counts.items() if count > 1]
    if repeated:
        raise Refused(
            f"{len(repeated)} sample ids stand in more than one calibration source, the first is {repeated[0]!r}; "
            "give each sample one id, and each source once"
        )
    return samples


def rows_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return samples as values of `SAMPLES_TYPE`."""
    return [{**asdict(sample), "images": list(sample.images)} for sample in samples]


def samples_of(rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Rebuild samples from values of `SAMPLES_TYPE`."""
    return [Sample(**{**row, "images": tuple(row["images"])}) for row in rows]


def calibration_digest(samples: Sequence[Sample]) -> str:
    """SHA-256, in hex, of all samples in order."""
    return digest_of([sample.digest for sample in samples])


def _limited(samples: list[Sample], limit: float | None) -> list[Sample]:
    if limit is None:
        return samples
    return samples[: math.ceil(limit * len(samples)) if limit < 1 else int(limit)]


def _task(source: str, limit: float | None, seed: int, include_path: str | None) -> list[Sample]:
    from shortv.evals.tasks import task_samples

    name, colon, _ = source.partition(":")
    if not colon and limit is not None and limit >= 1:
        return task_samples(f"{name}:{int(limit)}", seed, include_path)
    return _limited(task_samples(source, seed, include_path), limit)
