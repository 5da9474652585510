"""The law, for every learned system: the fast run equals the reference, on every family, and undoes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shortv.layers.apply import executing
from shortv.layers.cache import keep_rows
from shortv.layers.reference import reference
from tests.law import SPECS, assert_law, generated, in_dtype, text_logits
from tests.learned.cases import CASES, EVERYWHERE
from tests.models import batch_of, make_batch, prompts_of, random_model
from tests.parts import running

SYSTEMS = pytest.mark.parametrize("system", CASES)


@pytest.mark.parametrize(
    ("system", "family", "attn", "padding"),
    [
        *((*place, "sdpa", "left") for place in EVERYWHERE),
        *((system, "llava", *other) for system in CASES for other in (("sdpa", "right"), ("eager", "left"))),
    ],
)
def test_fast_equals_reference(system: str, family: str, attn: str, padding: str) -> None:
    model = random_model(family, attn=attn)
    batch = batch_of(family, SPECS, padding=padding)
    before, changed = text_logits(model, batch), 0
    for modes, trained in CASES[system].plans(model):
        with running(reference, model, modes, trained):
            expected = text_logits(model, batch)
        with running(executing, model, modes, trained):
            assert_law(text_logits(model, batch, use_cache=False), expected)
            assert_law(text_logits(model, batch, use_cache=True), expected)
        changed += not torch.allclose(expected, before, atol=1e-2)
    assert changed > 2
    assert torch.equal(text_logits(model, batch), before)


@pytest.mark.parametrize(
    ("system", "family", "options"),
    [
        *((*place, {}) for place in EVERYWHERE),
        *((system, "llava", {"num_beams": 3}) for system in CASES),
        *((system, "qwen2.5-vl", {"do_sample": True, "temperature": 0.8}) for system in CASES),
    ],
)
def test_generation_equals_reference(system: str, family: str, options: dict[str, Any]) -> None:
    """Layers that keep fewer positions may come first: layer 0's cache tells transformers the sequence length."""
    model = random_model(family)
    batch = batch_of(family, SPECS)
    for modes, trained in CASES[system].plans(model)[:2]:
        with running(reference, model, modes, trained):
            expected = generated(model, batch, **options)
        with running(executing, model, modes, trained):
            assert generated(model, batch, **options) == expected


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
@SYSTEMS
def test_a_batch_gives_what_its_prompts_give_alone(system: str, family: str) -> None:
    """Padding gives no information, and each sample has its own; several images are nothing special."""
    model = random_model(family)
    modes, trained = CASES[system].plans(model)[1]
    batch = batch_of(family, SPECS)
    with torch.inference_mode(), running(executing, model, modes, trained):
        together, tokens = model(**batch.inputs).logits, generated(model, batch)
        for row, prompt in enumerate(prompts_of(family, SPECS)):
            alone = make_batch(family, [prompt])
            logits_TV = model(**alone.inputs).logits[0]
            text_T = alone.types.text_BT[0]
            assert_law(together[row, -len(prompt.ids_T) :][text_T], logits_TV[text_T])
            assert generated(model, alone)[0][-4:] == tokens[row][-4:]


@SYSTEMS
def test_sequences_that_stay_in_a_batch_go_on_as_before(system: str) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    mask, rows = batch.inputs["attention_mask"], torch.tensor([3, 1])
    token = {"input_ids": torch.tensor([[7], [8], [9], [10]]), "position_ids": mask.sum(1, keepdim=True)}
    token["attention_mask"] = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
    for modes, trained in CASES[system].plans(model):
        with torch.inference_mode(), running(executing, model, modes, trained):
            caches = [model(**batch.inputs, use_cache=True).past_key_values for _ in range(2)]
            expected = model(**token, past_key_values=caches[0]).logits[rows]
            keep_rows(caches[1], rows)
            some = {name: value[rows] for name, value in token.items()}
            assert_law(model(**some, past_key_values=caches[1]).logits, expected)


@pytest.mark.parametrize("system", ["saisa", "eas"])
def test_gradients_reach_the_parts_as_through_the_reference_and_nothing_else(system: str) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    modes, trained = CASES[system].plans(model)[0]
    trained.parts.requires_grad_(True)
    gradients = []
    for executor in (executing, reference):
        trained.parts.zero_grad()
        with running(executor, model, modes, trained):
            model(**batch.inputs, use_cache=False).logits[batch.types.text_BT].square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in trained.parts.named_parameters()})
    for name, expected in gradients[1].items():
        bound = 1e-5 * float(expected.abs().max()) + 1e-8
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=bound, msg=name)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("family", "dtype"), [("llava", torch.bfloat16), ("qwen2.5-vl", torch.float16)])
@pytest.mark.parametrize("system", ["saisa", "eas"])
def test_half_precision_is_as_near_to_the_truth_as_the_reference(system: str, family: str, dtype: torch.dtype) -> None:
    truth, half = random_model(family), random_model(family).to(dtype)
    batch = batch_of(family, SPECS)
    modes, exact = CASES[system].plans(truth)[1]
    rough = CASES[system].plans(truth)[1][1]
    rough.parts.lower(dtype)
    with running(reference, truth, modes, exact):
        expected = text_logits(truth, batch)
    errors = []
    for executor in (executing, reference):
        with running(executor, half, modes, rough):
            errors.append((text_logits(half, in_dtype(batch, dtype)).float() - expected).abs().mean())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("system", ["saisa", "dyvte"])  # the reference of EAS replaces outputs after they are recorded
def test_hidden_states_have_every_row_and_the_same_text(system: str) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    for modes, trained in CASES[system].plans(model):
        found = []
        for executor in (reference, executing):
            with torch.inference_mode(), running(executor, model, modes, trained):
                found.append(model(**batch.inputs, output_hidden_states=True).hidden_states)
        for expected, state in zip(*found, strict=True):
            assert_law(state[batch.types.text_BT], expected[batch.types.text_BT])


@pytest.mark.parametrize("system", ["saisa", "dyvte"])
def test_prompts_without_images_are_the_models_own_work(system: str) -> None:
    model, batch = random_model(), batch_of("llava", [[3], [5]])
    untouched, tokens = text_logits(model, batch), generated(model, batch)
    modes, trained = CASES[system].plans(model)[1]
    with running(executing, model, modes, trained):
        assert torch.equal(text_logits(model, batch), untouched)
        assert generated(model, batch) == tokens
