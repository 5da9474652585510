"""What each Ray Train worker does: load the model, make the trainer, go on from the checkpoint, report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shortv.errors import ShortVError
from shortv.families import LoadedModel
from shortv.learned.system import System
from shortv.learned.training import Trainer, alone
from shortv.spec import ModelSpec
from shortv.workers.cluster import first_line
from shortv.workers.models import Environment, ModelLoader
from shortv.workers.shipping import ShippedFolder
from shortv.workers.training.checkpoint import CHECKPOINT_NAME, from_bytes
from shortv.workers.training.data import read_steps
from shortv.workers.training.loop import Alone, run_loop
from shortv.workers.training.messages import Failed, QueueReport, Trained
from shortv.workers.training.result import result_files
from shortv.workers.training.team import Distributed, PeerLost
from shortv.workers.worker import is_out_of_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """Everything a training worker is told."""

    engine: ModelLoader
    spec: ModelSpec
    folder: ShippedFolder | None
    device: str
    threads: int
    system: System
    recipe: Any
    thresholds: tuple[float, ...]
    parts_dtype: str
    identity: str
    checkpoint: Any
    """Object reference of the checkpoint's bytes, or None."""
    checkpoint_every: int
    queue: Any
    training: Mapping[str, Any]
    """What the parts' header is to say about their training."""
    seconds: float = 0.0
    """How long the steps up to the checkpoint took."""
    environment: Environment = field(default_factory=Environment)


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker.

    What would go wrong again is told to the driver; exceptions are left to what another attempt may mend.
    """
    job: WorkerJob = config["job"]
    report = QueueReport(job.queue, job.identity)
    try:
        _train(job, report)
    except PeerLost:
        raise
    except ShortVError as error:
        report.send(Failed(message=str(error)))
    except Exception as error:  # the model's library may raise anything: one line instead of a traceback
        message = f"{type(error).__name__}: {first_line(error)}"
        advice = "give a smaller --batch-size" if is_out_of_memory(error) else "what is finished is kept"
        report.send(Failed(message=f"the training failed with {message}; {advice}"))


def _train(job: WorkerJob, report: QueueReport) -> None:
    import ray
    import ray.train

    os.environ.update(job.environment)
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    loaded = _load(job)
    team = Distributed(loaded.device) if workers > 1 else Alone()
    reduce = team.reduce if isinstance(team, Distributed) else alone
    trainer = job.system.trainer(loaded, job.recipe, reduce)
    start = _restore(job, trainer, ray.get(job.checkpoint) if job.checkpoint is not None else None)
    began = time.monotonic()
    if start < trainer.steps:
        run_loop(
            trainer,
            read_steps(ray.train.get_dataset_shard(shard_name(rank))),
            start=start,
            checkpoint_every=job.checkpoint_every,
            report=report,
            team=team,
        )
    if team.first:
        report.send(Trained(files=_result(job, loaded, trainer, time.monotonic() - began)))


def shard_name(worker: int) -> str:
    """Name of a worker's data set among those that Ray Train hands out."""
    return f"train-{worker}"


def _load(job: WorkerJob) -> LoadedModel:
    folder = job.folder.local() if job.folder else None
    spec = job.spec.model_copy(update={"name": str(folder)}) if folder else job.spec
    loaded: LoadedModel = job.engine.load(spec, device=job.device, threads=job.threads)
    return loaded


def _restore(job: WorkerJob, trainer: Trainer[Any], content: bytes | None) -> int:
    if content is None:
        return 0
    checkpoint = from_bytes(content, job.identity, CHECKPOINT_NAME)
    trainer.restore(checkpoint.state)
    return checkpoint.step


def _result(job: WorkerJob, loaded: LoadedModel, trainer: Trainer[Any], seconds: float) -> dict[str, bytes]:
    parts = trainer.parts()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {job.device}"
    return result_files(
        loaded,
        parts,
        job.system.plans(parts.settings, loaded.architecture.num_layers, job.thresholds),
        model=job.spec.name,
        training={**job.training, "seconds": round(job.seconds + seconds, 1), "machine": machine},
        source={"training": dict(job.training), "recipe": job.recipe.model_dump(mode="json")},
        dtype=job.parts_dtype,
    )
