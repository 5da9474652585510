"""The part of a sweep that happens on Ray: pool, units, and each result kept as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console

from shortv.errors import ShortVError
from shortv.terminal import say
from shortv.workers.cluster import connected, first_line, free_nodes
from shortv.workers.journal import Journal
from shortv.workers.ledger import start_ledger
from shortv.workers.models import remote_model
from shortv.workers.placement import Placement, place
from shortv.workers.progress import SampleProgress
from shortv.workers.run import stop_on_signal
from shortv.workers.stream import stream_results, write_units
from shortv.workers.units import Unit, plan_units
from shortv.workers.worker import WorkerSetup

if TYPE_CHECKING:
    from shortv.workers.sweep import Prepared


def run_units(prepared: Prepared, journal: Journal, scratch: Path, console: Console) -> dict[str, Any]:
    """Measure every unit that the journal lacks; returns what the manifest should say about the run.

    Raises:
        Refused: the cluster cannot hold a worker.
        ShortVError: the model cannot be loaded, Ray failed, the disk is full, or the run was stopped.
    """
    request = prepared.request
    layers = prepared.architecture.num_layers
    if not plan_units(
        n_batches=len(prepared.batches), num_layers=layers, modes=request.modes, workers=1, finished=journal.finished()
    ):
        return {}
    # Ray's own SIGTERM handler, set when it connects, ends the process with a traceback.
    with connected(), stop_on_signal():
        pool = place(free_nodes(), workers=request.workers, gpus=request.gpus_per_worker, device=request.device)
        if pool.note:
            say(console, pool.note)
        units = plan_units(
            n_batches=len(prepared.batches),
            num_layers=layers,
            modes=request.modes,
            workers=pool.high,
            finished=journal.finished(),
            layers_per_unit=request.layers_per_unit,
        )
        setup = _setup(prepared, pool, scratch)
        paths = write_units(scratch, units, prepared.batches)
        with closing(stream_results(paths, setup, pool)) as results:
            _keep(prepared, journal, units, _ray_errors(results), console)
    return {"device": pool.device, "workers": pool.high}


def _setup(prepared: Prepared, pool: Placement, scratch: Path) -> WorkerSetup:
    request = prepared.request
    return WorkerSetup(
        engine=prepared.engine,
        model=remote_model(prepared.engine, request.model),
        device=pool.device,
        threads=pool.threads,
        modes=request.modes,
        stack=request.stack,
        ledger=start_ledger(scratch / "ledger.json"),
    )


def _keep(prepared: Prepared, journal: Journal, units: list[Unit], results: Iterator[str], console: Console) -> None:
    """Write each result to the journal as it comes, and check that each unit came."""
    layers = prepared.architecture.num_layers
    waiting = {unit.unit_id: unit for unit in units}
    left = sum(len(prepared.batches[unit.batch]) * len(unit.layers) for unit in units) / layers
    total = prepared.n_samples
    with SampleProgress(total=total, done=total - left, console=console) as progress:
        for text in results:
            value = json.loads(text)
            if value["fatal"] is not None:
                raise ShortVError(value["fatal"])
            unit = waiting.pop(value["unit_id"], None)
            if unit is None:
                continue
            journal.save(text, unit.unit_id)
            progress.advance(len(prepared.batches[unit.batch]) * len(unit.layers) / layers, len(value["errors"]))
    if waiting:
        raise ShortVError(
            f"Ray ended without the results of {len(waiting)} of {len(units)} units; run the same command to continue"
        )


def _ray_errors(results: Iterator[str]) -> Iterator[str]:
    try:
        yield from results
    except ray.exceptions.RayError as error:
        raise ShortVError(
            f"the work on Ray failed: {first_line(error)}; what is finished is kept, and the same command continues"
        ) from error
