"""Training of exit routers: labels by the papers' rules, the model untouched, and the same run after a restart."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from shortv.errors import SampleError, ShortVError
from shortv.families.supervised import supervised
from shortv.layers.apply import executing
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.dyvte.run import text_state
from shortv.learned.dyvte.train import AnswerScores, RouterTrainer, is_safe, prompt_types, with_own_answers
from shortv.learned.training import alone
from shortv.plan import modes_of_exit
from shortv.sample import Sample
from tests.tiny_model import bundled, calibration

LAYERS = 8
RECIPE = DyvteRecipe(width=16, steps=24, batch_size=4, learning_rate=1e-2)


def trainer_of(reduce: Any = alone, **changes: Any) -> RouterTrainer:
    return RouterTrainer(bundled(), RECIPE.model_copy(update=changes), reduce)


def some(count: int = 4, start: int = 0) -> list[Sample]:
    return list(calibration()[start : start + count])


def test_only_the_router_of_the_steps_layer_learns() -> None:
    loaded, trainer = bundled(), trainer_of()
    base = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    layers = [trainer.layer_of(step) for step in range(24)]
    assert set(layers) <= set(range(LAYERS)) and len(set(layers)) > 5
    before = trainer.state()
    metrics = trainer.step(some(), 0)
    after = trainer.state()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed and {name.split("routers.")[1].split(".")[0] for name in changed} == {str(layers[0])}
    assert metrics["layer"] == layers[0] and 0 < metrics["loss"] < 10
    assert all(torch.equal(weight, base[name]) for name, weight in loaded.model.state_dict().items())


def test_a_resumed_run_is_the_same_run() -> None:
    whole, resumed = trainer_of(), trainer_of()
    for step in range(4):
        if step == 2:
            resumed.restore(whole.state())
        whole.step(some(start=4 * step), step)
    for step in range(2, 4):
        resumed.step(some(start=4 * step), step)
    expected, found = whole.state(), resumed.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ShortVError, match="another folder"):
        trainer_of(width=8).restore(expected)


def test_routers_read_what_they_will_read_in_a_prefill() -> None:
    """The prompt's states alone, whatever the answer; those of each sample on its own."""
    loaded, samples = bundled(), some()
    batch = supervised(loaded, samples, padding_side="left")
    trainer, layer = trainer_of(), 3
    state_BE, _ = trainer.labels(batch, layer)
    for row, sample in enumerate(samples):
        alone_batch = supervised(loaded, [dataclasses.replace(sample, answer="nothing at all")])
        types, found = prompt_types(alone_batch), list[Tensor]()
        handle = loaded.decoder.layers[layer].register_forward_hook(
            lambda _, __, output, found=found: found.append(output)
        )
        with torch.no_grad():
            loaded.model(**alone_batch.batch.inputs)
        handle.remove()
        expected_1E = text_state(found[0][0], types.visual_BT[0], types.text_BT[0], "after-image")
        assert expected_1E is not None
        torch.testing.assert_close(state_BE[row], expected_1E[0], rtol=1e-4, atol=1e-4)


def test_labels_agree_with_what_the_model_answers_without_visual_tokens() -> None:
    """On its own answers the exact rule says whether the dropped model writes the same."""
    loaded, samples = bundled(), some(4)
    trainer = trainer_of(rule="exact", targets="model")
    own = with_own_answers(loaded, samples, 32)
    found: set[bool] = set()
    for layer in (0, 7):
        _, safe_B = trainer.labels(trainer.encoded(samples), layer)
        with executing(loaded.model, modes_of_exit(layer, LAYERS)):
            dropped = with_own_answers(loaded, samples, 32)
        assert safe_B.tolist() == [a.answer == b.answer for a, b in zip(own, dropped, strict=True)]
        found |= set(safe_B.tolist())
    assert found == {True, False} and bool(safe_B.all())


def scores(nats: list[float], choices: list[list[int]]) -> AnswerScores:
    counts = torch.tensor([len(row) for row in choices])
    return AnswerScores(choice_N=torch.tensor(choices).flatten(), nats_B=torch.tensor(nats), count_B=counts)


def test_rules() -> None:
    full = scores([1.0, 1.0, 1.0, 0.0, 0.001], [[1, 2]] * 5)
    left = scores([1.02, 1.04, 1.0, 0.0, 0.002], [[1, 2], [1, 2], [1, 3], [1, 2], [1, 2]])
    assert is_safe(full, left, DyvteRecipe()).tolist() == [True, False, False, True, False]
    assert is_safe(full, left, DyvteRecipe(agreement=0.4)).tolist() == [True, False, True, True, False]
    assert is_safe(full, left, DyvteRecipe(ce_slack=0.02)).tolist() == [True, True, False, True, True]
    assert is_safe(full, left, DyvteRecipe(rule="exact")).tolist() == [True, True, False, True, True]


def test_routers_learn_what_their_labels_say() -> None:
    trainer, samples = trainer_of(rule="exact", steps=8, learning_rate=1e-2), some(6)
    layer = trainer.layer_of(0)
    trainer.layer_of = lambda step: layer  # type: ignore[method-assign]
    losses = [trainer.step(samples, step)["loss"] for step in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_samples_that_cannot_be_used_are_named_before_anything_changes() -> None:
    trainer = trainer_of()
    before = trainer.state()
    good, other = some(2)
    for bad in (dataclasses.replace(other, answer=None), dataclasses.replace(other, images=())):
        with pytest.raises(SampleError, match=repr(other.sample_id)):
            trainer.step([good, bad], 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state().items())
    own = trainer_of(targets="model")
    assert own.step([good, dataclasses.replace(other, answer=None)], 0)["loss"] > 0
