"""The part of a training that happens on Ray Train: workers, their data, their messages, and attempts after deaths."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any

import ray
import ray.data
import ray.train
from ray.data import DataContext, ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from reports.locations import one_line
from shortv.errors import ShortVError
from shortv.learned.order import Order
from shortv.workers.models import hub_environment
from shortv.workers.placement import Placement
from shortv.workers.shipping import ShippedFolder, offer
from shortv.workers.training.data import put_samples, step_data
from shortv.workers.training.keeping import Keeper
from shortv.workers.training.messages import LENGTH, Failed, Trained
from shortv.workers.training.prepare import Prepared
from shortv.workers.training.worker import WorkerJob, shard_name, train_worker

MAX_DEATHS = 3
"""Attempts in a row that may end without a new checkpoint."""
SECONDS_TO_START = 300
_GROUP_SECONDS = 600
"""How long a worker waits for the others in one exchange of gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What every attempt has in common."""

    pool: Placement
    workers: int
    chunks: tuple[Any, ...]
    order: Order
    steps: int
    timeout: float


def train(prepared: Prepared, keeper: Keeper, pool: Placement, workers: int, handle: Callable[[Any], None]) -> None:
    """Train to the end; after the death of a worker process, go on from the last checkpoint.

    Args:
        handle: takes each message of the workers, in the order in which they were sent.

    Raises:
        ShortVError: a worker failed in a way that would repeat, workers died over and over, or nothing moved for
            too long.
    """
    course = Course(
        pool=pool,
        workers=workers,
        chunks=tuple(put_samples(prepared.samples)),
        order=prepared.order,
        steps=prepared.request.recipe.steps,
        timeout=prepared.request.timeout,
    )
    folder = offer(prepared.model_folder, prepared.model_digest)
    deaths = 0
    while True:
        before = keeper.step
        queue = Queue(maxsize=LENGTH, actor_options={"num_cpus": 0})
        try:
            error = _attempt(course, _job(prepared, keeper, pool, folder, queue), before, queue, handle)
        finally:
            queue.shutdown(force=True)
        if error is None:
            return
        deaths = 1 if keeper.step > before else deaths + 1
        if deaths >= MAX_DEATHS:
            raise ShortVError(
                f"training workers died {deaths} times after step {keeper.step}: {one_line(error)}; "
                "they may need more memory than their nodes have free; the same command continues"
            )


def _job(prepared: Prepared, keeper: Keeper, pool: Placement, folder: ShippedFolder | None, queue: Any) -> WorkerJob:
    request = prepared.request
    return WorkerJob(
        engine=prepared.engine,
        spec=request.model,
        folder=folder,
        device=pool.device,
        threads=pool.cpus if pool.device == "cpu" else 0,
        system=prepared.system,
        recipe=request.recipe,
        thresholds=request.thresholds,
        parts_dtype=request.parts_dtype,
        identity=prepared.record.arguments_digest,
        checkpoint=ray.put(keeper.content) if keeper.content is not None else None,
        checkpoint_every=request.checkpoint_every,
        queue=queue,
        training={
            "run": prepared.record.arguments_digest,
            "samples": len(prepared.samples),
            "steps": request.recipe.steps,
            "batch_size": request.recipe.batch_size,
        },
        seconds=keeper.summary().get("train_seconds", 0.0),
        environment=hub_environment(),
    )


def _attempt(
    course: Course, job: WorkerJob, start: int, queue: Any, handle: Callable[[Any], None]
) -> BaseException | None:
    """Run Ray Train once and take its messages; returns why it ended early, or None after the end of the training."""
    # Ray Train's fit blocks without a limit and takes SIGINT for itself; neither happens beside the main thread.
    fit = _Fit(course, job, start)
    moved, finished = time.monotonic(), False
    while True:
        alive = fit.is_alive()
        try:
            message = queue.get(timeout=0.5)
        except Empty:
            if not alive:
                break
            if time.monotonic() - moved > course.timeout:
                raise ShortVError(
                    f"no training step ended for {course.timeout:g} s; what is finished is kept, and the same command "
                    "continues (a slower machine needs a longer --timeout)"
                ) from None
            continue
        moved = time.monotonic()
        if isinstance(message, Failed):
            raise ShortVError(message.message)
        handle(message)
        finished = finished or isinstance(message, Trained)
    if finished:
        return None
    return fit.error or ShortVError("Ray Train ended before the last step")


class _Fit(threading.Thread):
    """Ray Train's blocking call, and the error it ended with."""

    def __init__(self, course: Course, job: WorkerJob, start: int) -> None:
        super().__init__(daemon=True, name="ray-train")
        self.error: BaseException | None = None
        self._arguments = course, job, start
        self.start()

    def run(self) -> None:
        """Train until the workers end."""
        try:
            with _quiet(), tempfile.TemporaryDirectory(prefix="shortv-train-", ignore_cleanup_errors=True) as scratch:
                _trainer(*self._arguments, scratch).fit()
        except Exception as error:  # whatever Ray raises is for the main thread to judge
            self.error = error


def _trainer(course: Course, job: WorkerJob, start: int, scratch: str) -> TorchTrainer:
    gpu = course.pool.gpus > 0
    datasets: dict[str, Any] = {
        shard_name(worker): step_data(
            course.chunks, course.order, start=start, steps=course.steps, worker=worker, workers=course.workers
        )
        for worker in range(course.workers)
        if start < course.steps
    }
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=course.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": course.pool.cpus, **({"GPU": course.pool.gpus} if gpu else {})},
        ),
        # Another attempt starts from this driver's checkpoint, which Ray Train does not know of.
        run_config=RunConfig(name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
        # Each worker reads its own data set: Ray's split promises no order.
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True)),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_GROUP_SECONDS),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A busy machine takes longer than Ray Train's minute to start processes that import torch.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(SECONDS_TO_START))
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
