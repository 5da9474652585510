"""The loop ends with the same weights whatever stops happened, and never keeps a state that is not finite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load, save
from torch import Tensor, nn

from shortv.errors import ShortVError
from shortv.learned.training import alone
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.training.data import Order
from shortv.workers.training.loop import DistributedGroup, SingleWorker, StepSamples, WorkerLost, run_loop
from tests.workers.training.toy import ToyRecipe, ToyTrainer, toy_samples


class Recorded:
    """What the loop reported."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.states: dict[int, bytes] = {}
        self.errors: list[ErrorRecord] = []
        self.steps: list[int] = []

    def progress(self, row: Mapping[str, Any]) -> None:
        self.steps.append(row["step"])

    def checkpoint(
        self,
        step: int,
        state: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, Any]],
        errors: Sequence[ErrorRecord],
    ) -> None:
        assert state is not None
        self.states[step] = save(dict(state))
        self.rows += rows
        self.errors = list(errors)


def batches(samples: Sequence[Sample], recipe: ToyRecipe, start: int, end: int) -> Iterator[StepSamples]:
    order = Order(samples=len(samples), batch_size=recipe.batch_size, seed=recipe.seed)
    for step in range(start, end):
        yield StepSamples(step=step, samples=tuple(samples[row] for row in order.rows(step)))


def trained(
    recipe: ToyRecipe, samples: Sequence[Sample], *, start: int = 0, state: bytes = b"", end: int = 0, every: int = 1
) -> Recorded:
    """Run to the end, or until the data ends before, from a state where given."""
    trainer, report = ToyTrainer(recipe, alone), Recorded()
    if state:
        trainer.restore(load(state))
    data = batches(samples, recipe, start, end or recipe.steps)
    try:
        run_loop(trainer, data, start=start, checkpoint_every=every, report=report, group=SingleWorker())
    except ShortVError:
        if not end:
            raise
    return report


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_stopped_run_ends_with_the_same_weights(stop: int) -> None:
    recipe, samples = ToyRecipe(), toy_samples(10, bad=(3, 4))
    whole = trained(recipe, samples)
    first = trained(recipe, samples, end=stop)
    second = trained(recipe, samples, start=stop, state=first.states[stop])
    assert second.states[recipe.steps] == whole.states[recipe.steps]
    assert [row["loss"] for row in first.rows + second.rows] == [row["loss"] for row in whole.rows]
    assert [row["step"] for row in whole.rows] == whole.steps == list(range(1, recipe.steps + 1))


def test_checkpoints_come_every_so_many_steps_and_at_the_end() -> None:
    report = trained(ToyRecipe(), toy_samples(10), every=3)
    assert list(report.states) == [3, 6, 7] and len(report.rows) == 7
    assert report.rows[-1]["metrics"] == [{"metric": "share", "value": 0.5}] and report.rows[-1]["samples"] == 28


def test_a_bad_sample_is_reported_once_and_replaced() -> None:
    report = trained(ToyRecipe(steps=12), toy_samples(10, bad=(3, 8)))
    assert sorted(error.sample_id for error in report.errors) == ["s3", "s8"]
    assert report.steps == list(range(1, 13))


def test_a_bad_sample_that_comes_twice_in_a_batch_is_reported_once() -> None:
    """As where a batch reaches over an epoch's end."""
    good, bad = toy_samples(2, bad=(1,))
    data, report = [StepSamples(step=0, samples=(bad, good, bad))], Recorded()
    trainer = ToyTrainer(ToyRecipe(steps=1), alone)
    run_loop(trainer, data, start=0, checkpoint_every=1, report=report, group=SingleWorker())
    assert [error.sample_id for error in report.errors] == ["s1"] and report.steps == [1]


def test_a_batch_of_bad_samples_alone_ends_the_run_with_their_name() -> None:
    with pytest.raises(ShortVError, match=r"none of the 4 samples of step 1 .* is bad"):
        trained(ToyRecipe(), toy_samples(4, bad=range(4)))


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before() -> None:
    recipe, report = ToyRecipe(nan_at=4), Recorded()
    data = batches(toy_samples(9), recipe, 0, recipe.steps)
    with pytest.raises(ShortVError, match=r"loss of step 5 is nan; the checkpoint of step 4 is kept"):
        run_loop(ToyTrainer(recipe, alone), data, start=0, checkpoint_every=2, report=report, group=SingleWorker())
    assert list(report.states) == [2, 4]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load(report.states[4]).values())


@pytest.mark.parametrize(("start", "message"), [(1, "data of step 1 is missing"), (7, "ended after step 0 of 7")])
def test_missing_data_is_an_error(start: int, message: str) -> None:
    recipe, trainer = ToyRecipe(), ToyTrainer(ToyRecipe(), alone)
    data = batches(toy_samples(9), recipe, start, recipe.steps)
    with pytest.raises(ShortVError, match=message):
        run_loop(trainer, data, start=0, checkpoint_every=2, report=Recorded(), group=SingleWorker())


def _member(rank: int, place: str) -> None:
    store = f"file://{place}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = DistributedGroup(torch.device("cpu"))
    assert group.first == (rank == 0)
    both, one, none = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        one.grad = torch.full((2, 3), 4.0)
    group.reduce([both, none, one])
    assert both.grad.unique().tolist() == [1.5]
    assert one.grad is not None and one.grad.unique().tolist() == [2.0] and none.grad is None
    assert group.mean({"loss": 1.0 + 2 * rank, "a": 0.0}) == {"loss": 2.0, "a": 0.0}
    if rank == 0:
        with pytest.raises(WorkerLost, match="a training worker was lost"):
            group.mean({"loss": 1.0})
    os._exit(0)  # at a usual end gloo's threads may still wait for the lost worker, and the process would abort


def test_gradients_and_metrics_are_averaged_and_a_lost_worker_is_an_error(tmp_path: Path) -> None:
    mp.spawn(_member, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
