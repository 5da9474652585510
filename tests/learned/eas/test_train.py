"""The search finds redundant layers, the trainer changes adapters alone, and a stopped run goes on as the same run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from shortv.errors import ShortVError
from shortv.families.supervised import supervised
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.eas.train import AdapterTrainer, Candidate, Search, ranked
from shortv.learned.training import alone
from shortv.plan import Mode
from shortv.sample import Sample
from tests.tiny_model import bundled, calibration

LAYERS = 8
SMALL: dict[str, Any] = {"kept_rank": 2, "pia_rank": 4, "batch_size": 4}
RECIPE = EasRecipe(steps=9, search_steps=6, search_warmup=2, every=2, candidates=3, skip=3, held_out=0.4, **SMALL)


def trainer_of(recipe: EasRecipe = RECIPE, reduce: Any = alone) -> AdapterTrainer:
    return AdapterTrainer(bundled(), recipe, reduce)


def searching(num_layers: int, **changes: Any) -> Search:
    return Search(EasRecipe(steps=2000, search_steps=1000, **changes), num_layers)


def some(step: int = 0, count: int = 4) -> list[Sample]:
    return list(calibration()[step * count : (step + 1) * count])


@pytest.mark.parametrize("probability", ["sigmoid", "softmax"])
def test_known_redundant_layers_are_ranked_first(probability: Any) -> None:
    """A bandit whose losses are sums over the skipped layers, with noise as large as the gaps."""
    redundant, needed = {2, 5, 11, 13}, 0.25
    search = searching(16, skip=4, search_warmup=20, every=1, probability=probability, eta=1.0, seed=3)
    noise = random.Random(0)

    def evaluate(candidates: Sequence[Candidate]) -> list[float]:
        return [
            0.5 + sum(needed for layer in candidate if layer not in redundant) + noise.gauss(0, 0.1)
            for candidate in candidates
        ]

    for step in range(300):
        if search.is_round(step):
            search.update(search.candidates(step), evaluate(search.candidates(step)))
    assert set(search.chosen()) == redundant
    assert set(ranked(search.scores_L.tolist())[:4]) == redundant


def test_the_update_is_the_papers() -> None:
    search = searching(4, skip=2, eta=2.0)
    search.scores_L[:] = torch.tensor([0.0, 1.0, -1.0, 0.5])
    p = search.scores_L.sigmoid()
    before = search.scores_L.clone()
    rewards = torch.tensor([0.2, 1.1], dtype=torch.float64).neg().exp()
    search.update([(0, 1), (1, 2)], [0.2, 1.1])
    gains = rewards - rewards.mean()
    expected = before + 2.0 * p * (1 - p) * torch.stack([gains[0], gains.sum(), gains[1], gains.sum() * 0])
    torch.testing.assert_close(search.scores_L, expected)
    with pytest.raises(ShortVError, match="loss nan"):
        search.update([(0, 1), (1, 2)], [0.2, float("nan")])


def test_draws_depend_on_seed_step_and_scores_alone() -> None:
    one, other = (searching(8, skip=3, candidates=4, every=3, search_warmup=6) for _ in range(2))
    for step in range(20):
        assert one.drawn(step) == other.drawn(step)
        assert one.candidates(step) == other.candidates(step)
        assert len(set(one.candidates(step))) == 4
        assert one.drawn(step) == tuple(sorted(set(one.drawn(step))))
    assert [one.size(step) for step in range(5)] == [1, 2, 3, 3, 3]
    assert {searching(8, skip=3, search_warmup=6, grows=False).size(step) for step in range(5)} == {3}
    assert [step for step in range(14) if one.is_round(step)] == [6, 9, 12]
    assert len({one.drawn(step) for step in range(6, 30)}) > 5
    # Few sets exist: a round compares all of them.
    assert len(searching(3, skip=2, search_warmup=0, candidates=9).candidates(0)) == 3
    one.scores_L[:] = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0])
    assert one.chosen() == (5, 6, 7)


def test_only_adapters_of_the_steps_modes_learn_and_the_search_ends_in_fresh_ones() -> None:
    loaded, trainer = bundled(), trainer_of()
    base = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    rounds = 0
    for step in range(9):
        searching, before = step < 6, trainer.state()
        metrics = trainer.step(some(step), step)
        after = trainer.state()
        assert 0 < metrics["loss"] < 20
        if searching:
            assert trainer.parts().settings.skipped == tuple(range(LAYERS)) == trainer.parts().settings.kept
            rounds += not torch.equal(before["search/scores"], after["search/scores"])
        else:
            settings = trainer.parts().settings
            assert len(settings.skipped) == metrics["skipped"] == 3
            assert set(settings.skipped) | set(settings.kept) == set(range(LAYERS))
            assert settings.skipped == tuple(sorted(ranked(settings.scores)[:3]))
            assert settings.modes(LAYERS).count(Mode.SKIP_ATTENTION) == 3
    assert rounds == 2
    assert all(torch.equal(weight, base[name]) for name, weight in loaded.model.state_dict().items())
    assert all(weight.grad is None for weight in loaded.model.parameters())


def test_a_resumed_run_is_the_same_run() -> None:
    whole, states = trainer_of(), []
    for step in range(9):
        states.append(whole.state())
        whole.step(some(step), step)
    expected = whole.state()
    for stop in (5, 6, 8):
        resumed = trainer_of()
        resumed.restore(states[stop])
        for step in range(stop, 9):
            resumed.step(some(step), step)
        found = resumed.state()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ShortVError, match="another folder"):
        trainer_of(RECIPE.model_copy(update={"pia_rank": 8})).restore(expected)


def test_training_lowers_the_loss_of_its_samples() -> None:
    """Random adapters of skipped layers start far from the model; a few steps on one batch bring it back."""
    recipe = EasRecipe(choice="given", layers=(2, 5), steps=12, learning_rate=2e-2, **SMALL)
    trainer, samples = trainer_of(recipe), some()
    losses = [trainer.step(samples, step)["loss"] for step in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_workers_share_the_losses_of_candidates() -> None:
    """Another worker's totals and tokens arrive through the gradients; the losses are those of all samples."""
    candidates: list[Candidate] = [(0,), (6, 7)]
    trainer, other = trainer_of(), supervised(bundled(), some(1), padding_side="left")
    own = supervised(bundled(), some(0), padding_side="left")
    with torch.no_grad():
        theirs = [trainer._loss(other, candidate) for candidate in candidates]
        ours = [trainer._loss(own, candidate) for candidate in candidates]

    def meet(parameters: Iterable[nn.Parameter]) -> None:
        (shared,) = parameters
        assert shared.grad is not None
        arriving = torch.tensor([*(float(total) for total, _ in theirs), theirs[0][1]], dtype=torch.float64)
        shared.grad = (shared.grad + arriving) / 2

    trainer._reduce = meet
    expected = [float(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(ours, theirs, strict=True)]
    assert trainer._losses(candidates, own) == pytest.approx(expected)
    trainer._reduce = alone
    assert trainer._losses(candidates, None) == [0.0, 0.0]


def test_no_sample_is_both_trained_on_and_rewarded_on() -> None:
    trainer = trainer_of()
    trained, held_out = trainer._divided(calibration())
    assert len(trained) + len(held_out) == len(calibration())
    assert 0.2 < len(held_out) / len(calibration()) < 0.6
    again = [trainer._divided([sample]) for sample in calibration()]
    assert [sample for one, _ in again for sample in one] == list(trained)
    assert trainer_of(RECIPE.model_copy(update={"held_out": 0}))._divided(some()) == (some(), some())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    def broken(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))

    trainer = trainer_of(EasRecipe(choice="given", steps=5, **SMALL), reduce=broken)
    before = trainer.state()
    assert trainer.step(some(), 0)["loss"] != trainer.step(some(), 0)["loss"]
    assert all(torch.equal(value, trainer.state()[name]) for name, value in before.items())


def test_layers_without_a_search() -> None:
    full = trainer_of(EasRecipe(choice="given", steps=2, **SMALL)).parts()
    assert full.settings.skipped == () and full.settings.kept == tuple(range(LAYERS))
    drawn = [trainer_of(EasRecipe(choice="random", skip=3, steps=2, seed=seed, **SMALL)).parts() for seed in (0, 0, 1)]
    assert drawn[0].settings == drawn[1].settings != drawn[2].settings
    assert len(drawn[0].settings.skipped) == 3 and not set(drawn[0].settings.skipped) & set(drawn[0].settings.kept)
    third = trainer_of(EasRecipe(choice="random", steps=2, **SMALL)).parts().settings
    assert third.modes(LAYERS).count(Mode.SKIP_ATTENTION) == LAYERS // 3
