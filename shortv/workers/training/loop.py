"""The training loop, with nothing of Ray in it: steps, unusable samples, losses that are not finite, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shortv.errors import SampleError, ShortVError
from shortv.learned.training import Trainer
from shortv.records import ErrorRecord
from shortv.sample import Sample

Row = Mapping[str, Any]
"""A row of the table `training`."""
Save = Callable[[int, Mapping[str, Tensor], Sequence[Row], Mapping[str, ErrorRecord]], None]
"""Takes the finished steps, and on the first worker the state, the rows since the last call, and the unusable samples
of all workers. Every worker calls it after the same steps."""


class WorkerLost(RuntimeError):
    """Another worker did not take part: its process has died, or its node cannot be reached."""


class Group:
    """The workers that train together, over the process group that Ray Train has set up; without one, a single worker.

    Every worker calls the methods in the same order. They raise WorkerLost.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Exchange numbers on the device that the process group's backend wants."""
        self._device = device
        self._size = dist.get_world_size() if dist.is_initialized() else 1
        self.first = self._size == 1 or dist.get_rank() == 0

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics averaged over the workers, which all have the same names."""
        if self._size == 1:
            return dict(metrics)
        names = sorted(metrics)
        values_N = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=self._device)
        with _exchange():
            dist.all_reduce(values_N)
        return dict(zip(names, (values_N / self._size).tolist(), strict=True))

    def union(self, own: dict[str, ErrorRecord]) -> dict[str, ErrorRecord]:
        """Return what all workers have found."""
        found = [own] * self._size
        if self._size > 1:
            with _exchange():
                dist.all_gather_object(found, own)
        return {name: error for each in found for name, error in each.items()}

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients in place; a parameter that no worker has a gradient for keeps none."""
        if self._size == 1:
            return
        listed = list(parameters)
        has_N = torch.tensor([float(one.grad is not None) for one in listed], device=self._device)
        with _exchange():
            dist.all_reduce(has_N)
            trained = [one for one, found in zip(listed, has_N.tolist(), strict=True) if found]
            gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
            # All are under way before the first is waited for: one exchange each would be mostly waiting.
            exchanges: list[Any] = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
            for exchange in exchanges:
                exchange.wait()
        for one, gradient in zip(trained, gradients, strict=True):
            one.grad = gradient.div_(self._size)


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of process groups are all of this class
        raise WorkerLost(f"a training worker was lost: {str(error).splitlines()[0]}") from error


def run_loop(
    trainer: Trainer[Any],
    batches: Iterable[Sequence[Sample]],
    *,
    start: int,
    checkpoint_every: int,
    group: Group,
    progress: Callable[[Row], None],
    save: Save,
) -> None:
    """Take the steps from `start` to the trainer's last one, with a checkpoint every so many and at the end.

    Samples that cannot be used are replaced by others of this worker's share, so that every step has its full batch
    on every worker.

    Args:
        batches: this worker's share of each of these steps.
        progress: called on the first worker after each step.

    Raises:
        ShortVError: a loss or a weight is not finite, or no sample of a batch can be used.
    """
    rows: list[Row] = []
    unusable: dict[str, ErrorRecord] = {}
    saved = start
    for done, samples in zip(range(start + 1, trainer.steps + 1), batches, strict=True):
        began = time.monotonic()
        metrics = group.mean(_step(trainer, samples, done - 1, unusable))
        if not math.isfinite(metrics["loss"]):
            raise ShortVError(f"the loss of step {done} is {metrics['loss']}; {_advice(saved)}")
        if group.first:
            rows.append(_row(metrics, done, trainer.batch_size, time.monotonic() - began))
            progress(rows[-1])
        if done % checkpoint_every == 0 or done == trainer.steps:
            state = trainer.state() if group.first else {}
            for name, tensor in state.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ShortVError(f"{name} is not finite after step {done}; {_advice(saved)}")
            save(done, state, rows, group.union(unusable))
            saved, rows = done, []


def _step(
    trainer: Trainer[Any], batch: Sequence[Sample], step: int, unusable: dict[str, ErrorRecord]
) -> dict[str, float]:
    """Take a step; where a sample turns out to be unusable, take it with others in its place."""
    samples = _replaced(batch, step, unusable)
    try:
        return trainer.step(samples, step)
    except SampleError as error:
        new = {sample.sample_id: found for sample in samples if (found := _fault(trainer, sample)) is not None}
        if not new:
            raise ShortVError(f"the samples of step {step + 1} cannot be used together: {error}") from error
    unusable.update(new)
    return trainer.step(_replaced(batch, step, unusable), step)


def _replaced(batch: Sequence[Sample], step: int, unusable: Mapping[str, ErrorRecord]) -> list[Sample]:
    good = [sample for sample in batch if sample.sample_id not in unusable]
    if not good:
        first = unusable[batch[0].sample_id]
        raise ShortVError(
            f"none of the {len(batch)} samples of step {step + 1} can be used; the first, "
            f"{first.sample_id!r}, failed at {first.stage}: {first.message}"
        )
    return [good[place % len(good)] if sample.sample_id in unusable else sample for place, sample in enumerate(batch)]


def _fault(trainer: Trainer[Any], sample: Sample) -> ErrorRecord | None:
    try:
        trainer.check(sample)
    except SampleError as error:
        return ErrorRecord(sample_id=sample.sample_id, stage=error.stage, error=error.error, message=error.message)
    return None


def _row(metrics: Mapping[str, float], step: int, batch_size: int, seconds: float) -> Row:
    columns = {"loss", "learning_rate"}
    others = {name: value for name, value in metrics.items() if name not in columns and math.isfinite(value)}
    return {
        "step": step,
        "samples": step * batch_size,
        "loss": metrics["loss"],
        "learning_rate": metrics.get("learning_rate"),
        "samples_per_second": batch_size / seconds if seconds > 0 else None,
        "seconds": seconds,
        "metrics": [{"metric": name, "value": value} for name, value in others.items()],
    }


def _advice(saved: int) -> str:
    there = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written"
    return f"{there}; train into another folder with a lower --learning-rate, or with --dtype float32"
