"""Learned parts judge a prompt and never its answer: with a cache, and without where the prompt is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from shortv.errors import ShortVError
from shortv.families import Batch, decoder_of
from shortv.layers.apply import executing
from shortv.layers.progress import prompted
from shortv.layers.reference import reference
from shortv.learned.dyvte.run import exit_layers
from tests.law import SPECS, generated, text_logits
from tests.learned.cases import FULL, MEANS, adapters, routers, skipping
from tests.models import batch_of, random_model
from tests.parts import running

MODES = skipping((1, 2))


@pytest.mark.parametrize("executor", [executing, reference])
def test_answer_tokens_leak_into_nothing(executor: Any) -> None:
    """What follows the prompt changes no earlier position; without telling the prompt it would."""
    model = random_model()
    learned, batch = adapters(model), batch_of("llava", [[3, "I", 6]])
    prompt_BT = batch.types.real_BT.clone()
    prompt_BT[:, -3:] = False
    ids_BT = batch.inputs["input_ids"].clone()
    ids_BT[:, -2] = (ids_BT[:, -2] + 7) % 80 + 3
    other = Batch(inputs={**batch.inputs, "input_ids": ids_BT}, types=batch.types)
    with running(executor, model, MODES, learned):
        with prompted(decoder_of(model), prompt_BT):
            found, changed = text_logits(model, batch), text_logits(model, other)
        assert torch.equal(found[:-2], changed[:-2])
        assert not torch.allclose(found[-2:], changed[-2:], atol=1e-3)
        assert not torch.allclose(text_logits(model, batch)[:-2], text_logits(model, other)[:-2], atol=1e-4)
        with pytest.raises(ShortVError, match="given for"), prompted(decoder_of(model), prompt_BT[:, :-1].repeat(2, 1)):
            text_logits(model, batch)


@pytest.mark.parametrize("executor", [executing, reference])
def test_without_a_cache_tokens_are_generated_where_the_prompt_is_known_and_only_there(executor: Any) -> None:
    model = random_model()
    learned, batch = adapters(model), batch_of("llava", SPECS)
    with running(executor, model, MODES, learned):
        with_cache = generated(model, batch)
        with prompted(decoder_of(model), batch.types.real_BT):
            assert generated(model, batch, use_cache=False) == with_cache
        for options in ({}, {"num_beams": 3}, {"do_sample": True}):
            with pytest.raises(ShortVError, match="eas parts would take the answer for the prompt; generate with"):
                generated(model, batch, use_cache=False, **options)
        # One token needs the prompt alone, and prompts that are no continuation are prompts.
        assert generated(model, batch, use_cache=False, max_new_tokens=1) == [row[:-3] for row in with_cache]
        for specs in ([[3, "I", 2]], [["I", 6]], [[3, "I", 3]], [[3, "I", 3]]):
            text_logits(model, batch_of("llava", specs, seed=len(specs[0])), use_cache=False)


@pytest.mark.parametrize("executor", [executing, reference])
@pytest.mark.parametrize("mean_over", MEANS)
def test_answers_decide_nothing(executor: Any, mean_over: str) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    differ = 0
    for seed in range(2):
        with (
            torch.inference_mode(),
            running(executor, model, FULL, routers(model, seed=seed, mean_over=mean_over)),
        ):
            tokens, exits = generated(model, batch), exit_layers(model(**batch.inputs, use_cache=True).past_key_values)
            with prompted(decoder_of(model), batch.types.real_BT):
                assert generated(model, batch, use_cache=False) == tokens
                ids_BT = torch.tensor(tokens)
                mask_BT = pad(batch.inputs["attention_mask"], (0, 4), value=1)
                longer = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
                whole = {**batch.inputs, "input_ids": ids_BT, **longer}
                assert exit_layers(model(**whole, use_cache=True).past_key_values) == exits
            differ += exit_layers(model(**whole, use_cache=True).past_key_values) != exits
            with pytest.raises(ShortVError, match="dyvte parts would take the answer for the prompt; generate with"):
                generated(model, batch, use_cache=False)
    assert differ
