"""The loop ends with the same weights whatever stops happened, and never keeps a state that is not finite."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from shortv.errors import ShortVError
from shortv.families import LoadedModel
from shortv.learned.dyvte import train
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.registry import SYSTEMS
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.plan import PartsKind
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.training.loop import Group, WorkerLost
from tests.tiny_model import bundled, calibration
from tests.workers.training.toy import Recorded, ToyRecipe, ToyTrainer, loop, toy_samples, trained


def test_a_stopped_run_ends_with_the_same_weights() -> None:
    recipe, samples = ToyRecipe(), toy_samples(10, bad=(3, 4))
    whole = trained(recipe, samples)
    assert [row["step"] for row in whole.rows] == whole.steps == list(range(1, recipe.steps + 1))
    for stop in (1, 3, 6):
        second = trained(recipe, samples, start=stop, state=whole.states[stop])
        assert [row["loss"] for row in second.rows] == [row["loss"] for row in whole.rows][stop:]
        found, expected = second.states[recipe.steps], whole.states[recipe.steps]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_checkpoints_come_every_so_many_steps_and_at_the_end() -> None:
    report = trained(ToyRecipe(), toy_samples(10), every=3)
    assert list(report.states) == [3, 6, 7] and len(report.rows) == 7
    assert report.rows[-1]["metrics"] == [{"metric": "share", "value": 0.5}] and report.rows[-1]["samples"] == 28


def test_bad_samples_are_reported_once_and_replaced() -> None:
    report = trained(ToyRecipe(steps=12), toy_samples(10, bad=(3, 8)))
    assert sorted(report.errors) == ["s3", "s8"] and report.steps == list(range(1, 13))
    # A sample comes twice in a batch that reaches over an epoch's end.
    good, bad = toy_samples(2, bad=(1,))
    assert list(loop(ToyTrainer(ToyRecipe(steps=1)), [(bad, good, bad)]).errors) == ["s1"]
    with pytest.raises(ShortVError, match=r"none of the 4 samples of step 1 .* is bad"):
        trained(ToyRecipe(), toy_samples(4, bad=range(4)))


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before() -> None:
    report = Recorded()
    with pytest.raises(ShortVError, match=r"loss of step 5 is nan; the checkpoint of step 4 is kept"):
        trained(ToyRecipe(nan_at=4), toy_samples(9), every=2, into=report)
    assert list(report.states) == [2, 4]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in report.states[4].values())


def test_a_state_of_other_parts_is_refused() -> None:
    state = trained(ToyRecipe(), toy_samples(4)).states[7]
    with pytest.raises(ShortVError, match="vector"):
        ToyTrainer(ToyRecipe()).restore({**state, "weight/vector": torch.zeros(3)})


def _member(rank: int, place: str) -> None:
    store = f"file://{place}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = Group(torch.device("cpu"))
    assert group.first == (rank == 0)
    both, one, none = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        one.grad = torch.full((2, 3), 4.0)
    group.reduce([both, none, one])
    assert both.grad.unique().tolist() == [1.5]
    assert one.grad is not None and one.grad.unique().tolist() == [2.0] and none.grad is None
    assert group.mean({"loss": 1.0 + 2 * rank, "a": 0.0}) == {"loss": 2.0, "a": 0.0}
    own = ErrorRecord(sample_id=f"s{rank}", stage="decode", error="fake", message="bad")
    assert list(group.union({f"s{rank}": own})) == ["s0", "s1"]
    if rank == 0:
        with pytest.raises(WorkerLost, match="a training worker was lost"):
            group.mean({"loss": 1.0})
    os._exit(0)  # at a usual end gloo's threads may still wait for the lost worker, and the process would abort


def test_workers_share_gradients_metrics_and_errors_and_a_lost_one_is_an_error(tmp_path: Path) -> None:
    # Forked: other processes would import everything again.
    mp.start_processes(_member, args=(str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]


DYVTE = DyvteRecipe(steps=1, batch_size=4, width=8)
RECIPES: dict[PartsKind, Any] = {
    PartsKind.DYVTE: DYVTE,
    PartsKind.SAISA: SaisaRecipe(projector_steps=1, joint_steps=0, batch_size=4),
    PartsKind.EAS: EasRecipe(choice="given", layers=(2,), steps=1, batch_size=4, kept_rank=2, pia_rank=4),
}


def unusable(kind: PartsKind, recipe: Any, *bad: Sample) -> dict[str, str]:
    """Take a step with samples among good ones; which samples were reported, and why."""
    report = loop(SYSTEMS[kind].trainer(bundled(), recipe), [(*calibration()[: 4 - len(bad)], *bad)])
    assert report.steps == [1]
    return {name: error.error for name, error in report.errors.items()}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_sample_that_a_system_cannot_use_ends_no_training(kind: PartsKind) -> None:
    text = Sample(sample_id="text", prompt="How many are there?", answer="Two.")
    quiet = replace(calibration()[3], sample_id="quiet", answer=" ")
    expected = {"text": "no-image"} if kind is PartsKind.DYVTE else {}
    assert unusable(kind, RECIPES[kind], text, quiet) == {**expected, "quiet": "no-answer"}


@pytest.mark.parametrize("neighbours", [False, True], ids=["always", "beside-others"])
def test_a_sample_to_which_the_model_says_nothing_ends_no_training(
    neighbours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always, it is reported; beside others alone, where padding moves the rounding, it is asked again and used."""
    silent = replace(calibration()[3], sample_id="silent", answer=None)

    def written(loaded: LoadedModel, samples: Sequence[Sample], max_tokens: int) -> list[str]:
        says = {"silent": "two" if neighbours and len(samples) == 1 else " "}
        return [says.get(sample.sample_id, "one") for sample in samples]

    monkeypatch.setattr(train, "_written", written)
    expected = {} if neighbours else {"silent": "no-answer"}
    assert unusable(PartsKind.DYVTE, DYVTE.model_copy(update={"targets": "model"}), silent) == expected
