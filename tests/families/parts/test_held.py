"""A model holds the parts it used last: read once, refused when their folder changed, gone with the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.families.parts import Learned, Parts, held, held_parts, load_parts
from shortv.layers.apply import apply
from shortv.plan import LearnedParts, PartsKind
from tests.models import batch_of, loaded, random_model
from tests.parts import plan_of, register, save_shifts


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of parts that were read."""
    register(monkeypatch)
    found: list[str] = []

    def load(named: LearnedParts, *rest: Any) -> Parts:
        found.append(Path(named.path).name)
        return load_parts(named, *rest)

    monkeypatch.setattr(held, "load_parts", load)
    return found


def hold(named: LearnedParts, model: LoadedModel) -> Parts:
    return held_parts(named, model.decoder, model.architecture)


def test_parts_are_read_once_and_the_last_ones_stay(tmp_path: Path, loads: list[str]) -> None:
    model = loaded(random_model())
    first, second, third = (save_shifts(tmp_path / str(seed), model, seed=seed, layers=(1,)) for seed in range(3))
    parts = hold(first, model)
    assert hold(second, model) is not parts and hold(first, model) is parts and loads == ["0", "1"]
    hold(third, model)
    assert hold(first, model) is parts and loads == ["0", "1", "2"]
    again = hold(second, model)
    assert loads == ["0", "1", "2", "1"] and torch.equal(again.shifts[0], load_parts_of(second, model).shifts[0])  # type: ignore[index]


def load_parts_of(named: LearnedParts, model: LoadedModel) -> Parts:
    return load_parts(named, model.decoder, model.architecture)


def test_each_model_has_its_own_in_its_own_type_and_takes_them_along(tmp_path: Path, loads: list[str]) -> None:
    one, other = loaded(random_model()), loaded(random_model())
    named = save_shifts(tmp_path, one, layers=(1,))
    kept, gone = hold(named, one), weakref.ref(hold(named, other))
    assert gone() is not kept
    del other
    gc.collect()
    assert gone() is None
    one.model.to(torch.bfloat16)
    assert hold(named, one).shifts[0].dtype == torch.bfloat16  # type: ignore[index, union-attr]


def test_a_folder_that_changed_is_refused_or_read_again(tmp_path: Path, loads: list[str]) -> None:
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(1,))
    before = hold(named, model)
    newer = save_shifts(tmp_path, model, layers=(1,), seed=1)
    with pytest.raises(Refused, match="are not those that the plan names"):
        hold(named, model)
    assert hold(newer, model) is not before
    weights = tmp_path / "parts.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(Refused, match="cut short"):
        hold(newer, model)


def test_a_cache_goes_on_in_another_context_of_its_plan_and_of_no_other(tmp_path: Path, loads: list[str]) -> None:
    model = loaded(random_model())
    plan = plan_of(model, save_shifts(tmp_path, model, layers=(1, 3)))
    assert plan.parts is not None
    batch, token = batch_of("llava", [[2, "I", 3]]), torch.tensor([[7]])
    stricter = replace(plan, parts=replace(plan.parts, threshold=0.75))
    with torch.inference_mode():
        with apply(model.model, plan):
            expected = model.model(
                input_ids=token, past_key_values=model.model(**batch.inputs, use_cache=True).past_key_values
            ).logits
            caches = [model.model(**batch.inputs, use_cache=True).past_key_values for _ in range(3)]
        with apply(model.model, plan):
            assert torch.equal(model.model(input_ids=token, past_key_values=caches[0]).logits, expected)
        assert len(loads) == 1
        held._held.clear()
        with apply(model.model, plan):
            assert torch.equal(model.model(input_ids=token, past_key_values=caches[1]).logits, expected)
        assert len(loads) == 2
        with apply(model.model, stricter), pytest.raises(ShortVError, match="not filled under this plan"):
            model.model(input_ids=token, past_key_values=caches[2])


def test_parts_are_the_same_by_digest_and_in_training_by_themselves(tmp_path: Path, loads: list[str]) -> None:
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(1,))
    first, second = (load_parts_of(named, model) for _ in range(2))
    assert first.digest == named.digest
    assert Learned(parts=first, threshold=0.5) == Learned(parts=second, threshold=0.5)
    assert Learned(parts=first, threshold=0.5) != Learned(parts=second, threshold=0.6)
    second.digest = None
    assert Learned(parts=first) != Learned(parts=second) == Learned(parts=second)
    first.kind = PartsKind.EAS  # type: ignore[misc]
    assert Learned(parts=first) != Learned(parts=load_parts_of(named, model))
