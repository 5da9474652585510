"""The Ray Data pipeline of a sweep: CPUs prepare the inputs of units, workers measure them, results stream back.

Why Ray Data: it overlaps the two stages, limits how many prepared batches wait in memory, starts more workers when
nodes join, and recomputes what was lost with a node. What it does not promise is kept by this project:

- An exception ends a Ray Data job, and a process that dies is retried for ever. Both stages therefore turn exceptions
  into error rows, and `attempts` counts the deaths of each unit outside the workers.
- Reading files takes a CPU, and a cluster may have none left. Units therefore start as tables in the object store, and
  the preparing stage asks for a CPU only where workers leave one free.
- A finished unit is committed by the driver, once, whatever ran twice.

Nothing private of Ray is used; the settings below are documented fields of `DataContext`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from shortv.sample import Sample
from shortv.workers.placement import Placement
from shortv.workers.samples import SAMPLES_TYPE, rows_of
from shortv.workers.sweep.units import Unit
from shortv.workers.sweep.worker import MeasuringStage, PreparingStage, WorkerSetup

# Units per worker from which on one that waits behind another costs less than it saves.
_MANY_UNITS = 8
_MAX_PREPARING = 16
# A unit of a large model may take long; Ray Data gives up when no unit ends for this time.
NO_PROGRESS_SECONDS = 6 * 3600


def stream_results(
    units: Sequence[Unit],
    batches: Sequence[Sequence[Sample]],
    setup: WorkerSetup,
    placement: Placement,
    *,
    spare_cpus: int,
) -> Generator[pa.Table]:
    """Run the units and yield the result of each, a table of one row, as soon as it is there.

    Close it before Ray is disconnected: what Ray Data does at its end would start Ray anew.
    """
    tables = [unit_input(unit, batches[unit.batch]) for unit in units]
    one_unit: dict[str, Any] = {
        "fn_constructor_args": (setup,),
        "batch_size": 1,
        "batch_format": "pyarrow",
        "scheduling_strategy": "SPREAD",
    }
    # A process prepares on each CPU that is free, else one for each worker.
    preparing = max(1, min(len(units), spare_cpus if spare_cpus > 0 else placement.high, _MAX_PREPARING))
    # A second unit at a worker hides the driver's answer, but few units are for all.
    in_flight = 2 if len(units) >= _MANY_UNITS * placement.high else 1
    with _settings(), warnings.catch_warnings():
        # Ray Data announces changes to arguments for which the pinned release has no other form.
        warnings.simplefilter("ignore")
        results = (
            # Unlike from_arrow this runs no task, for which a cluster may have no CPU left.
            ray.data.from_blocks(tables)
            .map_batches(
                PreparingStage,
                compute=ActorPoolStrategy(min_size=1, max_size=preparing),
                num_cpus=min(1, max(0, spare_cpus)),
                **one_unit,
            )
            .map_batches(
                MeasuringStage,
                compute=ActorPoolStrategy(
                    min_size=placement.low, max_size=placement.high, max_tasks_in_flight_per_actor=in_flight
                ),
                num_cpus=placement.cpus,
                num_gpus=placement.gpus,
                **one_unit,
            )
        )
        rows: Any = iter(results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0))
        with closing(rows):
            for table in rows:
                yield pa.table(table)


def unit_input(unit: Unit, samples: Sequence[Sample]) -> pa.Table:
    """Return a unit as the preparing stage takes it: a table of one row."""
    return pa.table({"unit_id": [unit.unit_id], "samples": pa.array([rows_of(samples)], SAMPLES_TYPE)})


@contextmanager
def _settings() -> Iterator[None]:
    """Use Ray Data without progress bars of its own, and with pools that grow."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    # Workers hold few units and are never busier than that: a pool that is all busy may grow.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
