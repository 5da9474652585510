"""What each Ray Train worker does: load the model, build the trainer, continue from the checkpoint, report."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint as StoredCheckpoint
from torch import Tensor

from shortv.errors import ShortVError, one_line
from shortv.families import LoadedModel
from shortv.learned.system import System
from shortv.learned.training import Trainer, alone
from shortv.records import ErrorRecord
from shortv.workers.models import RemoteModel, is_out_of_memory
from shortv.workers.training.checkpoint import RESULT, checkpoint_at, read_state, write_record, write_state
from shortv.workers.training.data import Order, steps_of_worker
from shortv.workers.training.loop import DistributedGroup, SingleWorker, WorkerLost, run_loop
from shortv.workers.training.result import write_result

SECONDS_BETWEEN_EVENTS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A step has ended; not every step is reported."""

    row: Mapping[str, Any]
    """Its row of the table `training`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A worker has stored its part of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The training cannot go on, and another attempt would fail in the same way."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """Everything that a training worker needs to know."""

    model: RemoteModel
    device: str
    threads: int
    system: System
    recipe: Any
    order: Order
    thresholds: tuple[float, ...]
    parts_dtype: str
    output: str
    """The run folder, which this worker must be able to read and write."""
    identity: str
    """Digest of the training's arguments, which ties checkpoints to it."""
    start: StoredCheckpoint | None = None
    """Where an earlier attempt stopped; Ray Train knows of later checkpoints itself."""
    checkpoint_every: int
    events: Any = None
    """A `ray.util.queue.Queue` of the driver, for Progressed, Saved and Failed."""
    training: Mapping[str, Any]
    """What the header of the parts says about their training."""


def train_worker(config: dict[str, Any]) -> None:
    """Train on one worker; this is the function that Ray Train runs.

    An error that another attempt would repeat is sent to the driver. Lost workers and failures of Ray are raised, so
    that Ray Train starts the workers again from the last checkpoint.
    """
    job: WorkerJob = config["job"]
    try:
        _train(job)
    except (WorkerLost, RayError):
        raise
    except ShortVError as error:
        job.events.put(Failed(message=str(error)))
    except Exception as error:  # the model's library may raise anything: one line instead of a traceback
        message = f"{type(error).__name__}: {one_line(error)}"
        advice = "give a smaller --batch-size" if is_out_of_memory(error) else "what is finished is kept"
        job.events.put(Failed(message=f"the training failed with {message}; {advice}"))


def _train(job: WorkerJob) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    loaded: LoadedModel = job.model.load(device=job.device, threads=job.threads)
    group = DistributedGroup(loaded.device) if workers > 1 else SingleWorker()
    reduce = group.reduce if isinstance(group, DistributedGroup) else alone
    trainer = job.system.trainer(loaded, job.recipe, reduce)
    report = _Report(job, loaded, trainer, rank=rank, workers=workers)
    start = report.restore()
    if start < trainer.steps:
        batches = steps_of_worker(job.output, job.order, start=start, steps=trainer.steps, worker=rank, workers=workers)
        run_loop(trainer, batches, start=start, checkpoint_every=job.checkpoint_every, report=report, group=group)


class _Report:
    """Stores checkpoints through Ray Train and sends progress to the driver; a Reporting."""

    def __init__(self, job: WorkerJob, loaded: LoadedModel, trainer: Trainer[Any], *, rank: int, workers: int) -> None:
        self._job, self._loaded, self._trainer = job, loaded, trainer
        self._rank, self._workers = rank, workers
        self._rows: list[Mapping[str, Any]] = []
        self._errors: dict[str, Mapping[str, Any]] = {}
        self._sent = -SECONDS_BETWEEN_EVENTS
        self._began, self._seconds = time.monotonic(), 0.0

    def restore(self) -> int:
        """Continue from the last checkpoint, if there is one; returns the number of finished steps."""
        stored = ray.train.get_checkpoint() or self._job.start
        if stored is None:
            return 0
        with stored.as_directory() as place:
            found = checkpoint_at(place, self._job.identity)
            if found is None:
                raise ShortVError(f"the checkpoint {stored.path} is not whole; delete it to go on from before it")
            self._trainer.restore(read_state(Path(place)))
        if self._rank == 0:
            self._rows = list(found.rows)
            self._errors = {row["sample_id"]: row for row in found.errors}
            self._seconds = sum(row["seconds"] for row in found.rows)
        return found.step

    def progress(self, row: Mapping[str, Any]) -> None:
        """Send a step to the driver, unless another was sent just before."""
        now = time.monotonic()
        if now - self._sent >= SECONDS_BETWEEN_EVENTS:
            self._sent = now
            self._job.events.put(Progressed(row=row))

    def checkpoint(
        self,
        step: int,
        state: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, Any]],
        errors: Sequence[ErrorRecord],
    ) -> None:
        """Store this worker's part of a checkpoint; after the last step it has the learned parts and plans too."""
        self._rows += rows
        self._errors |= {error.sample_id: asdict(error) for error in errors}
        with tempfile.TemporaryDirectory(prefix="shortv-checkpoint-") as name:
            place = Path(name)
            if state is not None:
                write_state(place, state)
                if step == self._trainer.steps:
                    self._write_result(place / RESULT)
            write_record(
                place,
                step=step,
                identity=self._job.identity,
                worker=self._rank,
                workers=self._workers,
                rows=self._rows,
                errors=list(self._errors.values()),
            )
            ray.train.report({"step": step}, checkpoint=StoredCheckpoint.from_directory(place))
        self._job.events.put(Saved())

    def _write_result(self, place: Path) -> None:
        job, parts = self._job, self._trainer.parts()
        seconds = self._seconds + time.monotonic() - self._began
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {job.device}"
        write_result(
            place,
            self._loaded,
            parts,
            job.system.plans(parts.settings, self._loaded.architecture.num_layers, job.thresholds),
            model=job.model.spec.name,
            training={**job.training, "seconds": round(seconds, 1), "machine": machine},
            source={"training": dict(job.training), "recipe": job.recipe.model_dump(mode="json")},
            dtype=job.parts_dtype,
        )
