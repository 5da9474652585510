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
from shortv.learned.system import System
from shortv.records import ErrorRecord
from shortv.workers.models import RemoteModel, is_out_of_memory
from shortv.workers.training.checkpoint import RESULT, checkpoint_at, read_state, write_checkpoint
from shortv.workers.training.data import Order, batches_of_worker
from shortv.workers.training.loop import Group, Row, WorkerLost, run_loop
from shortv.workers.training.result import write_result
from shortv.workers.training.spec import TrainSpec

SECONDS_BETWEEN_EVENTS = 0.5
SAVED = "saved"
"""The event of a checkpoint that was stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """Everything that a training worker needs to know."""

    spec: TrainSpec
    system: System
    recipe: Any
    model: RemoteModel
    order: Order
    output: str
    """The run folder, which this worker must be able to read and write."""
    identity: str
    """Digest of the training's arguments, which ties checkpoints to it."""
    device: str
    threads: int
    start: StoredCheckpoint | None = None
    """Where an earlier attempt stopped; Ray Train knows of later checkpoints itself."""
    events: Any = None
    """A `ray.util.queue.Queue` of the driver: rows of steps, though not of every step, SAVED, and a ShortVError where
    the training cannot go on and another attempt would fail in the same way."""


def train_worker(config: dict[str, Any]) -> None:
    """Train on one worker; this is the function that Ray Train runs.

    An error that another attempt would repeat is sent to the driver. Lost workers and failures of Ray are raised, so
    that Ray Train starts the workers again from the last checkpoint.
    """
    job: WorkerJob = config["job"]
    try:
        _Training(job).run()
    except (WorkerLost, RayError):
        raise
    except ShortVError as error:
        job.events.put(ShortVError(str(error)))
    except Exception as error:  # the model's library may raise anything: one line instead of a traceback
        message = f"{type(error).__name__}: {one_line(error)}"
        advice = "give a smaller --batch-size" if is_out_of_memory(error) else "what is finished is kept"
        job.events.put(ShortVError(f"the training failed with {message}; {advice}"))


class _Training:
    """One worker's part of a training: checkpoints go through Ray Train, progress to the driver."""

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        self._loaded = job.model.load(device=job.device, threads=job.threads)
        self._group = Group(self._loaded.device)
        self._trainer = job.system.trainer(self._loaded, job.recipe, self._group.reduce)
        self._rows: list[Row] = []
        self._errors: dict[str, Row] = {}
        self._sent = -SECONDS_BETWEEN_EVENTS
        self._began = time.monotonic()

    def run(self) -> None:
        """Take the steps that are left."""
        job, context, start, steps = self._job, ray.train.get_context(), self._restore(), self._trainer.steps
        if start < steps:
            rank, size = context.get_world_rank(), context.get_world_size()
            batches = batches_of_worker(job.output, job.order, start=start, steps=steps, worker=rank, workers=size)
            every = job.spec.checkpoint_every
            run_loop(
                self._trainer,
                batches,
                start=start,
                checkpoint_every=every,
                group=self._group,
                progress=self._progress,
                save=self._save,
            )

    def _restore(self) -> int:
        """Continue from the last checkpoint, if there is one; returns the number of finished steps."""
        stored = ray.train.get_checkpoint() or self._job.start
        if stored is None:
            return 0
        with stored.as_directory() as place:
            found = checkpoint_at(place, self._job.identity)
            if found is None:
                raise ShortVError(f"the checkpoint {stored.path} is not whole; delete it to go on from before it")
            self._trainer.restore(read_state(Path(place)))
        self._rows = list(found.rows)
        self._errors = {row["sample_id"]: row for row in found.errors}
        self._began -= sum(row["seconds"] for row in found.rows)
        return found.step

    def _progress(self, row: Row) -> None:
        """Send a step to the driver, unless another was sent just before."""
        now = time.monotonic()
        if now - self._sent >= SECONDS_BETWEEN_EVENTS:
            self._sent = now
            self._job.events.put(row)

    def _save(
        self, step: int, state: Mapping[str, Tensor], rows: Sequence[Row], errors: Mapping[str, ErrorRecord]
    ) -> None:
        """Store a checkpoint on the first worker; after the last step it has the learned parts and plans too."""
        if not self._group.first:
            ray.train.report({"step": step})
            return
        self._rows += rows
        self._errors |= {name: asdict(error) for name, error in errors.items()}
        with tempfile.TemporaryDirectory(prefix="shortv-checkpoint-") as name:
            if step == self._trainer.steps:
                self._write_result(Path(name) / RESULT)
            write_checkpoint(
                Path(name),
                state,
                step=step,
                identity=self._job.identity,
                rows=self._rows,
                errors=[self._errors[name] for name in sorted(self._errors)],
            )
            ray.train.report({"step": step}, checkpoint=StoredCheckpoint.from_directory(name))
        self._job.events.put(SAVED)

    def _write_result(self, place: Path) -> None:
        job, parts, recipe = self._job, self._trainer.parts(), self._job.recipe
        training = {
            "run": job.identity,
            "samples": job.order.samples,
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
        }
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {job.device}"
        write_result(
            place,
            self._loaded,
            parts,
            job.system.plans(parts.settings, self._loaded.architecture.num_layers, job.spec.threshold),
            model=job.model.spec.name,
            training={**training, "seconds": round(time.monotonic() - self._began, 1), "machine": machine},
            source={"training": training, "recipe": recipe.model_dump(mode="json")},
            dtype=job.spec.parts_dtype,
        )
