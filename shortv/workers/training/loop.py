"""The training loop, with nothing of Ray in it: steps, bad samples, losses that are not finite, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shortv.errors import SampleError, ShortVError
from shortv.learned.training import Trainer
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.training.rows import StepRow

_KNOWN = ("loss", "learning_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """This worker's share of a step's batch."""

    step: int
    samples: tuple[Sample, ...]


class Reporting(Protocol):
    """Where the loop sends what it finds; only the first of several workers sends rows and checkpoints."""

    def progress(self, row: StepRow) -> None:
        """A step has ended."""

    def errors(self, errors: Sequence[ErrorRecord]) -> None:
        """Samples that cannot be used were found, each for the first time."""

    def checkpoint(self, step: int, state: Mapping[str, Tensor], rows: Sequence[StepRow]) -> None:
        """Keep the state after so many steps, and the rows since the checkpoint before."""


class Team(Protocol):
    """The workers that train together."""

    @property
    def first(self) -> bool:
        """Whether this worker speaks for all."""

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics averaged over the workers; all call it with the same names."""
        ...


class Alone:
    """A single worker."""

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
    team: Team,
) -> None:
    """Take the steps from `start` to the trainer's last one, with a checkpoint every so many and at the end.

    Samples that cannot be used are reported and replaced by others of this worker's share, so that every step has
    its full batch on every worker.

    Raises:
        ShortVError: a loss or a weight is not finite, no sample of a batch can be used, or batches are missing.
    """
    rows: list[StepRow] = []
    known: dict[str, ErrorRecord] = {}
    kept, done = start, start
    for batch in batches:
        if batch.step != done:
            raise ShortVError(f"the data of step {done + 1} did not come, but that of step {batch.step + 1}")
        began = time.monotonic()
        metrics = team.mean(_step(trainer, batch, known, report))
        _check_finite(metrics["loss"], done + 1, kept)
        done += 1
        row = _row(metrics, done, trainer.batch_size, time.monotonic() - began)
        if team.first:
            rows.append(row)
            report.progress(row)
        if (done % checkpoint_every == 0 or done == trainer.steps) and team.first:
            state = trainer.state()
            _check_state(state, done, kept)
            report.checkpoint(done, state, rows)
            kept, rows = done, []
        if done == trainer.steps:
            return
    if done < trainer.steps:
        raise ShortVError(f"the data ended after step {done} of {trainer.steps}; run the same command to continue")


def _step(
    trainer: Trainer[Any], batch: StepSamples, known: dict[str, ErrorRecord], report: Reporting
) -> dict[str, float]:
    """Take a step; where a sample turns out to be bad, take it with others in the bad ones' places."""
    samples = _replaced(batch, known)
    try:
        return trainer.step(samples, batch.step)
    except SampleError as error:
        new = {sample.sample_id: found for sample in samples if (found := _fault(trainer, sample)) is not None}
        if not new:
            raise ShortVError(f"the samples of step {batch.step + 1} cannot be used together: {error}") from error
    known.update(new)
    report.errors(list(new.values()))
    return trainer.step(_replaced(batch, known), batch.step)


def _replaced(batch: StepSamples, known: Mapping[str, ErrorRecord]) -> list[Sample]:
    good = [sample for sample in batch.samples if sample.sample_id not in known]
    if not good:
        first = known[batch.samples[0].sample_id]
        raise ShortVError(
            f"none of the {len(batch.samples)} samples of step {batch.step + 1} can be used; the first, "
            f"{first.sample_id!r}, failed at {first.stage}: {first.message}"
        )
    return [
        sample if sample.sample_id not in known else good[place % len(good)]
        for place, sample in enumerate(batch.samples)
    ]


def _fault(trainer: Trainer[Any], sample: Sample) -> ErrorRecord | None:
    try:
        trainer.check(sample)
    except SampleError as error:
        return ErrorRecord(sample_id=sample.sample_id, stage=error.stage, error=error.error, message=error.message)
    return None


def _row(metrics: Mapping[str, float], step: int, batch_size: int, seconds: float) -> StepRow:
    return StepRow(
        step=step,
        samples=step * batch_size,
        loss=metrics["loss"],
        learning_rate=metrics.get("learning_rate"),
        samples_per_second=batch_size / seconds if seconds > 0 else None,
        seconds=seconds,
        metrics={name: value for name, value in metrics.items() if name not in _KNOWN},
    )


def _check_finite(loss: float, step: int, kept: int) -> None:
    if not math.isfinite(loss):
        raise ShortVError(f"the loss of step {step} is {loss}; {_advice(kept)}")


def _check_state(state: Mapping[str, Tensor], step: int, kept: int) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ShortVError(f"{name} is not finite after step {step}; {_advice(kept)}")


def _advice(kept: int) -> str:
    there = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was written"
    return f"{there}; train into another folder with a lower --learning-rate, or with --dtype float32"
