"""Parts are loaded once and shared while anything uses them; a model keeps those it used last."""

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
from shortv.learned import files
from shortv.learned.apply import apply
from shortv.learned.base import Parts
from shortv.learned.files import PartsCache, load_parts
from shortv.plan import LearnedParts
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

    monkeypatch.setattr(files, "load_parts", load)
    return found


def taken(cache: PartsCache, named: LearnedParts, model: LoadedModel) -> Any:
    return cache.load(named, model.decoder, model.architecture)


def test_parts_are_read_once_and_the_last_ones_stay(tmp_path: Path, loads: list[str]) -> None:
    model, cache = loaded(random_model()), PartsCache(keep=2)
    first, second, third = (save_shifts(tmp_path / str(seed), model, seed=seed, layers=(1,)) for seed in range(3))
    taken(cache, first, model), taken(cache, second, model), taken(cache, first, model)
    assert loads == ["0", "1"]
    taken(cache, third, model), taken(cache, first, model)
    assert loads == ["0", "1", "2"]
    taken(cache, second, model)
    assert loads == ["0", "1", "2", "1"]


def test_without_keeping_parts_live_as_long_as_they_are_used(tmp_path: Path, loads: list[str]) -> None:
    model, cache = loaded(random_model()), PartsCache(folders={"elsewhere": lambda: tmp_path})
    plan = plan_of(model, replace(save_shifts(tmp_path, model, layers=(1,)), path="elsewhere"))
    assert plan.parts is not None
    stricter = replace(plan, parts=replace(plan.parts, threshold=0.9))
    runs: Any = [cache.run(one, model.decoder, model.architecture) for one in (plan, stricter)]
    assert runs[0].parts is runs[1].parts and runs[0].identity != runs[1].identity and len(loads) == 1
    assert runs[0].parts.identity == plan.parts.digest
    runs[0].parts.digest = None
    assert runs[0].parts.identity not in (plan.parts.digest, None)
    gone = weakref.ref(runs[0].parts)
    del runs
    gc.collect()
    assert gone() is None


def test_each_model_has_its_own_parts_in_its_own_dtype(tmp_path: Path, loads: list[str]) -> None:
    one, other = (loaded(random_model()) for _ in range(2))
    plan = plan_of(one, save_shifts(tmp_path, one, layers=(1,)))
    for model in (one, other, one):
        with apply(model.model, plan):
            pass
    assert len(loads) == 2
    one.model.to(torch.bfloat16)
    with apply(one.model, plan):
        pass
    assert len(loads) == 3


def test_a_folder_that_changed_is_refused_or_read_again(tmp_path: Path, loads: list[str]) -> None:
    model, cache = loaded(random_model()), PartsCache(keep=2)
    named = save_shifts(tmp_path, model, layers=(1,))
    before = taken(cache, named, model)
    newer = save_shifts(tmp_path, model, layers=(1,), seed=1)
    with pytest.raises(Refused, match="are not those that the plan names"):
        taken(cache, named, model)
    assert taken(cache, newer, model) is not before
    weights = tmp_path / "parts.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(Refused, match="cut short"):
        taken(cache, newer, model)


def test_a_kv_cache_is_continued_in_another_context_of_its_plan_and_of_no_other(
    tmp_path: Path, loads: list[str]
) -> None:
    model = loaded(random_model())
    plan = plan_of(model, save_shifts(tmp_path, model, layers=(1, 3)))
    assert plan.parts is not None
    batch, token = batch_of("llava", [[2, "I", 3]]), torch.tensor([[7]])
    stricter = replace(plan, parts=replace(plan.parts, threshold=0.75))
    with torch.inference_mode():
        with apply(model.model, plan):
            caches = [model.model(**batch.inputs, use_cache=True).past_key_values for _ in range(3)]
            expected = model.model(input_ids=token, past_key_values=caches[0]).logits
        with apply(model.model, plan):
            assert torch.equal(model.model(input_ids=token, past_key_values=caches[1]).logits, expected)
        with apply(model.model, stricter), pytest.raises(ShortVError, match="not filled under this plan"):
            model.model(input_ids=token, past_key_values=caches[2])
