"""The training loop, with nothing of Ray in it: steps, unusable samples, losses that are not finite, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shortv.errors import SampleError, ShortVError
from shortv.learned.training import Trainer
from shortv.records import ErrorRecord
from shortv.sample import Sample

_COLUMNS = ("loss", "learning_rate")
_BUCKET = 2**24
"""Numbers from which on one exchange of gradients is large enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """This worker's share of a step's batch."""

    step: int
    samples: tuple[Sample, ...]


class Reporting(Protocol):
    """Where the loop sends what it finds."""

    def progress(self, row: Mapping[str, Any]) -> None:
        """A step has ended; called on the first worker. The row is one of the table `training`."""

    def checkpoint(
        self,
        step: int,
        state: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, Any]],
        errors: Sequence[ErrorRecord],
    ) -> None:
        """Store the state after `step` steps; called on every worker at the same steps.

        Args:
            state: what to continue from, on the first worker; None on the others.
            rows: the steps since the checkpoint before, on the first worker; empty on the others.
            errors: all samples that this worker could not use.
        """


class Group(Protocol):
    """The workers that train together."""

    @property
    def first(self) -> bool:
        """Whether this is worker 0, which speaks for all."""

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics averaged over the workers; all call it with the same names."""
        ...


class SingleWorker:
    """The group of a single worker."""

    first = True

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics as they are."""
        return dict(metrics)


def run_loop(
    trainer: Trainer[Any],
    batches: Iterable[StepSamples],
    *,
    start: int,
    checkpoint_every: int,
    report: Reporting,
    group: Group,
) -> None:
    """Take the steps from `start` to the trainer's last one, with a checkpoint every so many and at the end.

    Samples that cannot be used are replaced by others of this worker's share, so that every step has its full batch
    on every worker.

    Raises:
        ShortVError: a loss or a weight is not finite, no sample of a batch can be used, or batches are missing.
    """
    rows: list[dict[str, Any]] = []
    unusable: dict[str, ErrorRecord] = {}
    saved, done = start, start
    for batch in batches:
        if batch.step != done:
            raise ShortVError(f"the data of step {done + 1} is missing; the next is that of step {batch.step + 1}")
        began = time.monotonic()
        metrics = group.mean(_step(trainer, batch, unusable))
        _check_finite(metrics["loss"], done + 1, saved)
        done += 1
        if group.first:
            rows.append(_row(metrics, done, trainer.batch_size, time.monotonic() - began))
            report.progress(rows[-1])
        if done % checkpoint_every == 0 or done == trainer.steps:
            state = trainer.state() if group.first else None
            _check_state(state or {}, done, saved)
            report.checkpoint(done, state, rows, list(unusable.values()))
            saved, rows = done, []
        if done == trainer.steps:
            return
    if done < trainer.steps:
        raise ShortVError(f"the data ended after step {done} of {trainer.steps}; run the same command to continue")


def _step(trainer: Trainer[Any], batch: StepSamples, unusable: dict[str, ErrorRecord]) -> dict[str, float]:
    """Take a step; where a sample turns out to be unusable, take it with others in its place."""
    samples = _replaced(batch, unusable)
    try:
        return trainer.step(samples, batch.step)
    except SampleError as error:
        new = {sample.sample_id: found for sample in samples if (found := _fault(trainer, sample)) is not None}
        if not new:
            raise ShortVError(f"the samples of step {batch.step + 1} cannot be used together: {error}") from error
    unusable.update(new)
    return trainer.step(_replaced(batch, unusable), batch.step)


def _replaced(batch: StepSamples, unusable: Mapping[str, ErrorRecord]) -> list[Sample]:
    good = [sample for sample in batch.samples if sample.sample_id not in unusable]
    if not good:
        first = unusable[batch.samples[0].sample_id]
        raise ShortVError(
            f"none of the {len(batch.samples)} samples of step {batch.step + 1} can be used; the first, "
            f"{first.sample_id!r}, failed at {first.stage}: {first.message}"
        )
    return [
        sample if sample.sample_id not in unusable else good[place % len(good)]
        for place, sample in enumerate(batch.samples)
    ]


def _fault(trainer: Trainer[Any], sample: Sample) -> ErrorRecord | None:
    try:
        trainer.check(sample)
    except SampleError as error:
        return ErrorRecord(sample_id=sample.sample_id, stage=error.stage, error=error.error, message=error.message)
    return None


def _row(metrics: Mapping[str, float], step: int, batch_size: int, seconds: float) -> dict[str, Any]:
    others = {name: value for name, value in metrics.items() if name not in _COLUMNS and math.isfinite(value)}
    return {
        "step": step,
        "samples": step * batch_size,
        "loss": metrics["loss"],
        "learning_rate": metrics.get("learning_rate"),
        "samples_per_second": batch_size / seconds if seconds > 0 else None,
        "seconds": seconds,
        "metrics": [{"metric": name, "value": value} for name, value in others.items()],
    }


def _check_finite(loss: float, step: int, saved: int) -> None:
    if not math.isfinite(loss):
        raise ShortVError(f"the loss of step {step} is {loss}; {_advice(saved)}")


def _check_state(state: Mapping[str, Tensor], step: int, saved: int) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ShortVError(f"{name} is not finite after step {step}; {_advice(saved)}")


def _advice(saved: int) -> str:
    there = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written"
    return f"{there}; train into another folder with a lower --learning-rate, or with --dtype float32"


class WorkerLost(RuntimeError):
    """Another worker did not take part: its process has died, or its node cannot be reached."""


class DistributedGroup:
    """Several workers over torch's process group, which Ray Train has set up."""

    def __init__(self, device: torch.device) -> None:
        """Average on the device that the process group's backend wants."""
        self._device = device

    @property
    def first(self) -> bool:
        """Whether this is worker 0."""
        return dist.get_rank() == 0

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics averaged over the workers."""
        names = sorted(metrics)
        values_N = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=self._device)
        _sum(values_N)
        return dict(zip(names, (values_N / dist.get_world_size()).tolist(), strict=True))

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients in place; a parameter that no worker has a gradient for keeps none."""
        listed = list(parameters)
        has_N = torch.tensor([float(p.grad is not None) for p in listed], device=self._device)
        _sum(has_N)
        trained = [parameter for parameter, found in zip(listed, has_N.tolist(), strict=True) if found]
        for bucket in _buckets(trained):
            flat_N = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
            _sum(flat_N)
            flat_N /= dist.get_world_size()
            for parameter, mean in zip(bucket, torch.split(flat_N, [p.numel() for p in bucket]), strict=True):
                parameter.grad = mean.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype whose gradients travel together: one exchange each would be mostly waiting."""
    for _, same in groupby(parameters, key=lambda parameter: (parameter.dtype, parameter.device)):
        bucket, size = [], 0
        for parameter in same:
            bucket.append(parameter)
            size += parameter.numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _sum(tensor: Tensor) -> None:
    try:
        reduce: Any = dist.all_reduce
        reduce(tensor)
    except RuntimeError as error:  # torch's errors of process groups are all of this class
        raise WorkerLost(f"a training worker was lost: {str(error).splitlines()[0]}") from error
