"""Training samples through Ray Data: each worker's share of each step, in the order of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from shortv.learned.order import Order
from shortv.sample import Sample
from shortv.workers.stream import UNIT_SCHEMA
from shortv.workers.training.loop import StepSamples

CHUNK = 512
"""Samples per object in Ray's store."""
STEPS_PER_TASK = 8
# Tasks that ask for no CPU are bounded by nothing else: Ray would start a process for each of them at once.
TASKS = 2
_SAMPLES = UNIT_SCHEMA.field("samples").type
_STEPS = pa.schema([pa.field("step", pa.int64(), nullable=False), pa.field("samples", _SAMPLES)])
_ROW = pa.schema(list(_SAMPLES.value_type))


def put_samples(samples: Sequence[Sample]) -> list[Any]:
    """Put samples into Ray's store, from where any node takes what it needs."""
    rows = [{**asdict(sample), "images": list(sample.images)} for sample in samples]
    tables = (pa.Table.from_pylist(rows[start : start + CHUNK], schema=_ROW) for start in range(0, len(rows), CHUNK))
    return [ray.put(table) for table in tables]


def step_data(chunks: Sequence[Any], order: Order, *, start: int, steps: int, worker: int, workers: int) -> Dataset:
    """The share of one worker in the steps from `start` on, one row a step; nothing is read before it is needed."""
    # Numbers of steps, not a read: reading takes a CPU, and a worker may hold the last one.
    tables = [
        pa.table({"step": pa.array(range(first, min(first + STEPS_PER_TASK, steps)), pa.int64())})
        for first in range(start, steps, STEPS_PER_TASK)
    ]
    assemble: Any = _assemble
    return ray.data.from_arrow(tables).map_batches(
        assemble,
        fn_kwargs={"chunks": list(chunks), "order": order, "worker": worker, "workers": workers},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        concurrency=TASKS,
    )


def _assemble(table: pa.Table, *, chunks: Sequence[Any], order: Order, worker: int, workers: int) -> pa.Table:
    found = []
    for step in table.column("step").to_pylist():
        places = [divmod(row, CHUNK) for row in order.share(step, worker, workers)]
        needed = sorted({at for at, _ in places})
        tables = dict(zip(needed, ray.get([chunks[at] for at in needed]), strict=True))
        rows = [tables[at].slice(row, 1).to_pylist()[0] for at, row in places]
        found.append({"step": step, "samples": rows})
    return pa.Table.from_pylist(found, schema=_STEPS)


def read_steps(batches: Any) -> Iterator[StepSamples]:
    """What a worker gets from its share of the data set, as the loop takes it."""
    for table in batches.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for row in pa.table(table).to_pylist():
            samples = tuple(Sample(**{**value, "images": tuple(value["images"])}) for value in row["samples"])
            yield StepSamples(step=row["step"], samples=samples)
