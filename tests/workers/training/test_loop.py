"""The loop ends with the same weights whatever stops happened, and never keeps a checkpoint that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from shortv.errors import ShortVError
from shortv.learned.order import Order
from shortv.learned.training import alone
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.training.checkpoint import from_bytes, to_bytes
from shortv.workers.training.loop import Alone, StepSamples, run_loop
from shortv.workers.training.rows import StepRow
from tests.workers.training.toy import ToyRecipe, ToyTrainer, toy_samples


class Recorded:
    """What the loop reported."""

    def __init__(self) -> None:
        self.rows: list[StepRow] = []
        self.kept: dict[int, bytes] = {}
        self.bad: list[ErrorRecord] = []
        self.told: list[int] = []

    def progress(self, row: StepRow) -> None:
        self.told.append(row.step)

    def errors(self, errors: Sequence[ErrorRecord]) -> None:
        self.bad += errors

    def checkpoint(self, step: int, state: Mapping[str, Tensor], rows: Sequence[StepRow]) -> None:
        self.kept[step] = to_bytes(step, state, "run")
        self.rows += rows


def batches(samples: Sequence[Sample], recipe: ToyRecipe, start: int, end: int) -> Iterator[StepSamples]:
    order = Order(samples=len(samples), batch_size=recipe.batch_size, seed=recipe.seed)
    for step in range(start, end):
        yield StepSamples(step=step, samples=tuple(samples[row] for row in order.rows(step)))


def trained(
    recipe: ToyRecipe,
    samples: Sequence[Sample],
    *,
    content: bytes | None = None,
    end: int | None = None,
    every: int = 1,
) -> Recorded:
    """Run to the end, or until the data ends, from a checkpoint's bytes where given."""
    trainer, start, report = ToyTrainer(recipe, alone), 0, Recorded()
    if content is not None:
        start, state = from_bytes(content, "run", "checkpoint")
        trainer.restore(state)
    data = batches(samples, recipe, start, recipe.steps if end is None else end)
    try:
        run_loop(trainer, data, start=start, checkpoint_every=every, report=report, team=Alone())
    except ShortVError:
        if end is None:
            raise
    return report


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_stopped_run_ends_with_the_same_weights(stop: int) -> None:
    recipe, samples = ToyRecipe(), toy_samples(10, bad=(3, 4))
    whole = trained(recipe, samples)
    first = trained(recipe, samples, end=stop)
    second = trained(recipe, samples, content=first.kept[stop])
    assert second.kept[recipe.steps] == whole.kept[recipe.steps]
    assert [row.loss for row in first.rows + second.rows] == [row.loss for row in whole.rows]
    assert [row.step for row in whole.rows] == whole.told == list(range(1, recipe.steps + 1))


def test_checkpoints_come_every_so_many_steps_and_at_the_end() -> None:
    report = trained(ToyRecipe(), toy_samples(10), every=3)
    assert list(report.kept) == [3, 6, 7] and len(report.rows) == 7
    assert report.rows[-1].metrics == {"share": 0.5} and report.rows[-1].samples == 28


def test_a_bad_sample_is_reported_once_and_replaced() -> None:
    report = trained(ToyRecipe(steps=12), toy_samples(10, bad=(3, 8)))
    assert sorted(error.sample_id for error in report.bad) == ["s3", "s8"]
    assert report.rows[-1].step == 12


def test_a_bad_sample_that_comes_twice_in_a_batch_is_reported_once() -> None:
    """As where a batch reaches over an epoch's end."""
    good, bad = toy_samples(2, bad=(1,))
    data, report = [StepSamples(step=0, samples=(bad, good, bad))], Recorded()
    trainer = ToyTrainer(ToyRecipe(steps=1), alone)
    run_loop(trainer, data, start=0, checkpoint_every=1, report=report, team=Alone())
    assert [error.sample_id for error in report.bad] == ["s1"] and report.told == [1]


def test_a_batch_of_bad_samples_alone_ends_the_run_with_their_name() -> None:
    with pytest.raises(ShortVError, match=r"none of the 4 samples of step 1 .* is bad"):
        trained(ToyRecipe(), toy_samples(4, bad=range(4)))


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before() -> None:
    recipe, report = ToyRecipe(nan_at=4), Recorded()
    with pytest.raises(ShortVError, match=r"loss of step 5 is nan; the checkpoint of step 4 is kept"):
        run_loop(
            ToyTrainer(recipe, alone),
            batches(toy_samples(9), recipe, 0, recipe.steps),
            start=0,
            checkpoint_every=2,
            report=report,
            team=Alone(),
        )
    assert list(report.kept) == [2, 4]
    state = from_bytes(report.kept[4], "run", "checkpoint").state
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


@pytest.mark.parametrize(("start", "message"), [(1, "data of step 1 did not come"), (7, "ended after step 0 of 7")])
def test_missing_data_is_an_error(start: int, message: str) -> None:
    recipe = ToyRecipe()
    with pytest.raises(ShortVError, match=message):
        run_loop(
            ToyTrainer(recipe, alone),
            batches(toy_samples(9), recipe, start, recipe.steps),
            start=0,
            checkpoint_every=2,
            report=Recorded(),
            team=Alone(),
        )
