"""Training of SAISA's parts: what each stage changes, that it learns, and that it can be taken up again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shortv.families import LoadedModel, load
from shortv.families.supervised import IGNORED, supervised
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.saisa.train import ProjectorTrainer
from shortv.learned.training import alone
from shortv.sample import Sample
from tests.tiny_model import TINY, bundled, calibration

RECIPE = SaisaRecipe(batch_size=4, projector_steps=2, joint_steps=2, projector_rate=1e-3, joint_rate=1e-3)


@cache
def samples() -> tuple[Sample, ...]:
    return tuple(sample for sample in calibration() if sample.images and sample.answer)[:8]


def trainer_of(loaded: LoadedModel | None = None, **changes: Any) -> ProjectorTrainer:
    return ProjectorTrainer(loaded or bundled(), RECIPE.model_copy(update=changes), alone)


def weights(module: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def run(trainer: ProjectorTrainer, first: int, last: int) -> list[float]:
    return [trainer.step(samples()[:4], step)["loss"] for step in range(first, last)]


def test_the_first_stage_trains_projectors_and_the_second_the_language_model_too() -> None:
    base = weights(bundled().model)
    trainer = trainer_of()
    start = weights(trainer.parts())
    run(trainer, 0, 2)
    first = weights(trainer.parts())
    assert steps_taken(trainer) == {2}
    run(trainer, 2, 3)
    assert steps_taken(trainer) == {1}, "the second stage starts with a fresh optimizer"
    run(trainer, 3, 4)
    second = weights(trainer.parts())
    for name, before in start.items():
        assert torch.equal(before, first[name]) == name.startswith("language_model"), name
    # Tokens that no sample holds have no gradient; every tensor moved all the same.
    assert not any(torch.equal(first[name], second[name]) for name in first)
    after = weights(bundled().model)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert not any(weight.requires_grad or weight.grad is not None for weight in bundled().model.parameters())


def steps_taken(trainer: ProjectorTrainer) -> set[int]:
    return {int(value) for name, value in trainer.state().items() if name.startswith("step/")}


def test_training_learns() -> None:
    losses = run(trainer_of(projector_steps=3, joint_steps=5, warmup_share=0.0), 0, 8)
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_training_is_the_same_training() -> None:
    """Taken up within a stage, and where the second one begins."""
    whole, states, losses = trainer_of(joint_steps=3), [], []
    for step in range(5):
        states.append(whole.state())
        losses += run(whole, step, step + 1)
    for stop in (1, 2, 4):
        resumed = trainer_of(joint_steps=3)
        resumed.restore(states[stop])
        assert run(resumed, stop, 5) == losses[stop:]
        found = weights(resumed.parts())
        assert all(torch.equal(found[name], value) for name, value in weights(whole.parts()).items())


def test_a_shared_first_stage_keeps_the_projectors_copies_of_one() -> None:
    trainer = trainer_of(first_stage="shared", projector_steps=2, joint_steps=1)
    start = weights(trainer.parts().projectors["0"])
    run(trainer, 0, 2)
    own = [weights(projector) for projector in trainer.parts().projectors.values()]
    assert not any(torch.equal(own[0][name], value) for name, value in start.items())
    assert all(torch.equal(other[name], value) for other in own for name, value in own[0].items())
    run(trainer, 2, 3)
    own = [weights(projector) for projector in trainer.parts().projectors.values()]
    assert not torch.equal(own[0]["linear_1.weight"], own[1]["linear_1.weight"])


def test_gradients_are_averaged_over_the_same_weights_whatever_a_worker_has() -> None:
    """A worker whose samples have no image takes part with zeros."""
    averaged: list[int] = []
    trainer = ProjectorTrainer(bundled(), RECIPE, lambda weights: averaged.append(len(list(weights))))
    metrics = trainer.step([Sample(sample_id="t", prompt="How many are there?", answer="Two.")], 0)
    trainer.step(samples()[:2], 1)
    assert averaged == [len(list(trainer.parts().projectors.parameters()))] * 2
    assert metrics["loss"] > 0 and metrics["gradient_norm"] == 0


def test_a_model_in_half_precision_is_trained_in_float32() -> None:
    half = load(str(TINY / "model"), dtype="bfloat16")
    trainer = trainer_of(half)
    expected, found = run(trainer_of(), 0, 3), run(trainer, 0, 3)
    assert found == pytest.approx(expected, rel=0.1)
    assert {weight.dtype for weight in trainer.parts().parameters()} == {torch.float32}
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}


def test_logits_are_computed_only_where_they_predict_an_answer() -> None:
    rows: list[int] = []
    handle = bundled().decoder.head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    batch = supervised(bundled(), samples()[:4])
    run(trainer_of(), 0, 1)
    handle.remove()
    assert rows == [int((batch.labels_BT != IGNORED).sum())]
    assert rows[0] < batch.labels_BT.numel() / 4
