"""The driver of a training: starts the workers, keeps what they send, writes every result file."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from reports.manifest import State, utc_now
from shortv.errors import Refused
from shortv.learned.registry import SYSTEMS
from shortv.learned.system import System
from shortv.spec import WorkerRange
from shortv.terminal import say
from shortv.workers.models import ModelLoader
from shortv.workers.placement import Placement
from shortv.workers.progress import SampleProgress
from shortv.workers.run import exit_status, one_driver, open_run, stop_on_signal
from shortv.workers.training.keeping import Keeper
from shortv.workers.training.messages import Progressed, Saved, Unusable
from shortv.workers.training.prepare import Prepared, prepare
from shortv.workers.training.request import TrainRequest
from shortv.workers.training.rows import StepRow

DATA_NAME = "data.parquet"


def run_training(
    request: TrainRequest,
    *,
    system: System | None = None,
    engine: ModelLoader | None = None,
    console: Console | None = None,
) -> int:
    """Run, continue or repeat a training, say where its parts are, and return the exit status (0, or 3).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or Console()
    with stop_on_signal():
        prepared = prepare(request, system or SYSTEMS[request.kind], engine or ModelLoader())
        if prepared.record.state is State.RUNNING:
            with one_driver(prepared.folder):
                prepared = _trained(prepared, console)
        return _report(prepared, console)


def _trained(prepared: Prepared, console: Console) -> Prepared:
    """Start an attempt on the folder, which is this driver's alone, and end it with the final manifest."""
    # Another driver may have been at work until the lock was had.
    latest = open_run(prepared.folder, prepared.record)
    if latest.state is not State.RUNNING:
        return replace(prepared, record=latest)
    started = time.monotonic()
    latest = latest.updated(attempts=latest.attempts + 1)
    keeper = Keeper(prepared.folder, latest.arguments_digest)
    prepared = replace(prepared, record=latest)
    details = _train_on_ray(prepared, keeper, console)
    final = latest.updated(
        state=State.PARTIAL if keeper.errors else State.COMPLETE,
        counts={**latest.counts, "errors": len(keeper.errors)},
        finished=utc_now(),
        wall_seconds=time.monotonic() - started + (latest.wall_seconds or 0.0),
        details={**latest.details, **details, **keeper.summary()},
    )
    final.save(prepared.folder)
    return replace(prepared, record=final)


def _train_on_ray(prepared: Prepared, keeper: Keeper, console: Console) -> dict[str, Any]:
    """Train from the last checkpoint to the end; returns what the manifest should say about the run.

    Raises:
        Refused: the cluster cannot hold a worker, or the workers asked for cannot share a batch.
        ShortVError: the training failed, Ray failed, the disk is full, or the run was stopped.
    """
    from shortv.workers.cluster import connected, free_nodes
    from shortv.workers.placement import place
    from shortv.workers.training.running import train

    request, recipe = prepared.request, prepared.request.recipe
    # Ray's own SIGTERM handler, set when it connects, ends the process with a traceback.
    with connected(), stop_on_signal():
        pool = place(free_nodes(), workers=request.workers, gpus=1, device=request.device)
        if pool.note:
            say(console, pool.note)
        workers = workers_of(pool, request.workers, recipe.batch_size)
        _begin(prepared, keeper)
        total, done = recipe.steps * recipe.batch_size, keeper.step * recipe.batch_size
        with SampleProgress(total=total, done=done, console=console, label=str(request.kind)) as progress:

            def handle(message: Any) -> None:
                nonlocal done
                keeper.handle(message)
                row = _last_row(message)
                if row is not None:
                    progress.note(f"loss {row.loss:.4f}")
                    # After a worker's death, steps since the checkpoint are taken again and count once.
                    progress.advance(max(0, row.samples - done), 0)
                    done = max(done, row.samples)

            train(prepared, keeper, pool, workers, handle)
    return {"device": pool.device, "workers": workers}


def _last_row(message: Any) -> StepRow | None:
    if isinstance(message, Progressed):
        return message.row
    return message.rows[-1] if isinstance(message, Saved) and message.rows else None


def _begin(prepared: Prepared, keeper: Keeper) -> None:
    """Write what a run that is under way shows: its manifest, and what is generated for it or already unusable."""
    prepared.record.save(prepared.folder)
    if prepared.unusable:
        keeper.handle(Unusable(errors=prepared.unusable))
    if prepared.generated is not None and not prepared.folder.exists(DATA_NAME):
        sink = pa.BufferOutputStream()
        pq.write_table(prepared.generated, sink, compression="zstd")
        prepared.folder.write_bytes(DATA_NAME, sink.getvalue().to_pybytes())


def workers_of(pool: Placement, wish: WorkerRange | None, batch_size: int) -> int:
    """How many workers train: of what fits, the most that share a batch evenly.

    Raises:
        Refused: a number was asked for that does not.
    """
    if wish is not None and wish.low == wish.high and batch_size % wish.low:
        raise Refused(
            f"{wish.low} workers cannot share a batch of {batch_size} samples evenly; "
            "give a --batch-size that is a multiple of --workers"
        )
    most = min(pool.high, batch_size)
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def _report(prepared: Prepared, console: Console) -> int:
    record, folder = prepared.record, prepared.folder
    details, errors = record.details, record.counts.get("errors", 0)
    loss = details.get("loss")
    console.print(
        f"{record.parts} parts after {record.counts['steps']} steps, loss {loss:.4f}, "
        f"{details.get('train_seconds', 0.0):.0f} s of training: {folder.shown}/parts",
        highlight=False,
        soft_wrap=True,
    )
    for name in folder.list("plans"):
        console.print(f"plan {folder.shown}/{name}", highlight=False, soft_wrap=True)
    if errors:
        console.print(
            f"{errors} samples could not be used: {folder.shown}/errors.parquet", highlight=False, soft_wrap=True
        )
    return exit_status(errors, record.counts["samples"], prepared.request.fail_on_error)
