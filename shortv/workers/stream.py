"""The Ray Data pipeline: units from Parquet files through a pool of workers, results back to the driver."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import parquet as pq
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shortv.errors import ShortVError
from shortv.sample import Sample
from shortv.workers.placement import Placement
from shortv.workers.units import Unit
from shortv.workers.worker import SweepWorker, WorkerSetup

UNIT_SCHEMA = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field(
            "samples",
            pa.list_(
                pa.struct(
                    [
                        pa.field("sample_id", pa.string()),
                        pa.field("images", pa.list_(pa.large_binary())),
                        pa.field("prompt", pa.string()),
                        pa.field("answer", pa.string()),
                        pa.field("dataset", pa.string()),
                    ]
                )
            ),
        ),
    ]
)
# Units per worker from which on one that waits behind another costs less than it saves.
_MANY_UNITS = 8
# A unit of a large model may take long; Ray Data gives up when no unit ends for this time.
NO_PROGRESS_SECONDS = 6 * 3600.0


def write_units(place: Path, units: Sequence[Unit], batches: Sequence[Sequence[Sample]]) -> list[Path]:
    """Write one Parquet file per unit, so that a worker's death repeats that unit alone.

    Raises:
        ShortVError: the disk is full.
    """
    paths = []
    for unit in units:
        row = {"unit_id": unit.unit_id, "samples": [_row(sample) for sample in batches[unit.batch]]}
        path = place / f"{unit.unit_id}.parquet"
        try:
            pq.write_table(pa.Table.from_pylist([row], schema=UNIT_SCHEMA), path)
        except OSError as error:
            raise ShortVError(f"{path} could not be written: {error}; free space there or set TMPDIR") from error
        paths.append(path)
    return paths


def stream_results(paths: Sequence[Path], setup: WorkerSetup, pool: Placement) -> Generator[str]:
    """Run the units and yield each result, as JSON text, as soon as it is there.

    Close it before Ray is disconnected: what Ray Data does at its end would start Ray anew.
    """
    with _quiet_context():
        results = _pipeline(paths, setup, pool)
        batches: Any = iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        with closing(batches):
            for table in batches:
                yield from pa.table(table).column("result").to_pylist()


def _row(sample: Sample) -> Mapping[str, object]:
    return {**asdict(sample), "images": list(sample.images)}


def _pipeline(paths: Sequence[Path], setup: WorkerSetup, pool: Placement) -> Dataset:
    """Read on the driver's node, with no CPU: a cluster may have none left, and other nodes lack the files."""
    with _free_sampling(), warnings.catch_warnings():
        # `local://` and remote arguments are announced to change; the pinned release has no other way to bind a
        # read to a node, nor to keep an actor pool from being fused with it.
        warnings.simplefilter("ignore")
        units = ray.data.read_parquet([f"local://{path}" for path in paths], num_cpus=0, override_num_blocks=len(paths))
        return units.map_batches(
            SweepWorker,
            fn_constructor_args=(setup,),
            # One unit; with GPUs Ray Data insists on a number.
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=pool.low,
                max_size=pool.high,
                max_tasks_in_flight_per_actor=_in_flight(len(paths), pool),
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            scheduling_strategy="SPREAD",
        )


def _in_flight(units: int, pool: Placement) -> int:
    """Units that a worker holds: a second one hides the driver's answer, but with few units others would lack it."""
    return 2 if units >= _MANY_UNITS * pool.high else 1


@contextmanager
def _free_sampling() -> Iterator[None]:
    """Let read_parquet look at its first file without a CPU; it takes one, and waits for ever where none is left."""
    from ray.data._internal.datasource import parquet_datasource as reader

    module: Any = reader
    before = module.cached_remote_fn
    module.cached_remote_fn = partial(before, num_cpus=0)
    try:
        yield
    finally:
        module.cached_remote_fn = before


@contextmanager
def _quiet_context() -> Iterator[None]:
    """Ray Data without progress bars of its own, with pools that grow, and a reader that can be bound to a node."""
    context = DataContext.get_current()
    names = ("enable_progress_bars", "use_datasource_v2", "execution_no_progress_timeout_s", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names if hasattr(context, name)}
    context.enable_progress_bars = False
    # The newer reader lists files in tasks that take a CPU on any node.
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    scaling = context.autoscaling_config
    threshold = scaling.actor_pool_util_upscaling_threshold
    # Workers hold one unit each and are never busier than that: a pool that is all busy may grow.
    scaling.actor_pool_util_upscaling_threshold = 1.0
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        scaling.actor_pool_util_upscaling_threshold = threshold
        for name, value in before.items():
            setattr(context, name, value)
