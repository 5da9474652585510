"""The part of a training that runs on Ray Train: workers, what they report, and new attempts after their deaths."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from queue import Empty

import ray.train
from ray.exceptions import RayError
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from reports.locations import locate
from shortv.errors import ShortVError, one_line
from shortv.workers.placement import Placement
from shortv.workers.training.checkpoint import CHECKPOINTS, Checkpoint, latest_checkpoint, new_attempt
from shortv.workers.training.loop import Row
from shortv.workers.training.worker import SAVED, WorkerJob, train_worker

MAX_DEATHS = 3
"""Attempts in a row that may end without a new checkpoint."""
_SETTINGS = {
    # A busy machine takes longer than Ray Train's minute to start processes that import torch.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # Ray Train takes one report at each look at its workers, which is every two seconds otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_GROUP_SECONDS = 600
"""How long a worker waits for the others in one exchange of gradients."""


def fit(job: WorkerJob, placement: Placement, *, workers: int) -> Iterator[Row | Checkpoint]:
    """Train from the last checkpoint to the end; Ray Train starts workers again that die.

    Args:
        job: what the workers get, apart from their start and the queue of their events.

    Yields:
        Rows of steps, though not of every step, and the last whole checkpoint, perhaps more than once.

    Raises:
        ShortVError: a worker failed in a way that would repeat, the workers do not fit, they died again and again
            without a new checkpoint, or no step ended for too long.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = latest_checkpoint(job.output, job.identity)
    while found is None or found.step < job.recipe.steps:
        start = ray.train.Checkpoint(found.path, locate(job.output).filesystem) if found else None
        error = yield from _attempts(replace(job, start=start), placement, workers)
        before, found = found, latest_checkpoint(job.output, job.identity)
        if isinstance(error, ControllerError):
            raise ShortVError(
                f"Ray Train could not run {workers} workers with {placement.cpus} CPUs and {placement.gpus:g} GPUs "
                f"each: {_reason(error.controller_failure)}; wait for other work to end, or give fewer --workers"
            )
        if found is not None:
            yield found
        if found is None or (before is not None and found.step <= before.step):
            raise ShortVError(
                f"training workers died {MAX_DEATHS} times after step {found.step if found else 0}: "
                f"{_reason(error)}; they may need more memory than their nodes have free; the same command continues"
            )


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "Ray Train ended before the last step"
    failures = getattr(error, "worker_failures", None)
    return one_line(failures[min(failures)] if failures else error)


def _attempts(
    job: WorkerJob, placement: Placement, workers: int
) -> Generator[Row | Checkpoint, None, BaseException | None]:
    """Run Ray Train once, which is up to MAX_DEATHS attempts; returns why it ended early, or None."""
    events, timeout = Queue(actor_options={"num_cpus": 0}), job.spec.timeout
    # Ray Train's fit blocks without a limit and takes SIGINT for itself; neither happens beside the main thread.
    thread = _Fit(trainer_of(replace(job, events=events), placement, workers))
    moved = time.monotonic()
    try:
        while True:
            alive = thread.is_alive()
            try:
                event = events.get(timeout=0.5)
            except Empty:
                if not alive:
                    return thread.error
                if time.monotonic() - moved > timeout:
                    raise ShortVError(
                        f"no training step ended for {timeout:g} s; what is finished is kept, and the same command "
                        "continues (a slower machine needs a longer --timeout)"
                    ) from None
                continue
            moved = time.monotonic()
            if isinstance(event, ShortVError):
                raise event
            found = latest_checkpoint(job.output, job.identity) if event == SAVED else event
            if found is not None:
                yield found
    except RayError as error:
        raise ShortVError(f"Ray failed during the training: {one_line(error)}; the same command continues") from error
    finally:
        events.shutdown(force=True)


class _Fit(threading.Thread):
    """Ray Train's blocking call, and the error that it ended with."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train")
        self.error: BaseException | None = None
        self._trainer = trainer
        self.start()

    def run(self) -> None:
        """Train until the workers end."""
        try:
            self._trainer.fit()
        except (Exception, SystemExit) as error:  # whatever Ray raises is for the main thread to judge
            self.error = error


def trainer_of(job: WorkerJob, placement: Placement, workers: int) -> TorchTrainer:
    """Return Ray Train's trainer for a new attempt."""
    gpu = placement.gpus > 0
    location = locate(job.output)
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            # Where no CPU is free a worker asks for none. Ray refuses a worker without any resource: one byte is free.
            resources_per_worker={
                "CPU": placement.cpus,
                **({"GPU": placement.gpus} if gpu else {}),
                **({} if gpu or placement.cpus else {"memory": 1}),
            },
        ),
        run_config=RunConfig(
            name=new_attempt(job.output),
            storage_path=f"{location.path}/{CHECKPOINTS}",
            storage_filesystem=location.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            # Ray Train counts deaths over a run; `fit` starts another run where there was a checkpoint in between.
            failure_config=FailureConfig(  # type: ignore[call-arg]  # the class that ray.train has at run time
                max_failures=MAX_DEATHS - 1, controller_failure_limit=1
            ),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_GROUP_SECONDS),
    )
