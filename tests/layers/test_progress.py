"""What a plan remembers of a sequence, and what it refuses rather than run silently as another model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from shortv.errors import Refused, ShortVError
from shortv.families import Batch, decoder_of
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import ProjectorSettings
from shortv.plan import Mode
from tests.law import assert_fast_is_reference, assert_law, text_logits
from tests.models import LAYERS, Spec, batch_of, random_model
from tests.parts import Trained, running

Modes = tuple[Mode, ...]
FROZEN: Modes = (Mode.FREEZE_VISUAL,) * LAYERS
DROPPED: Modes = (Mode.DROP_VISUAL,) * LAYERS
LATE: Modes = (Mode.FULL, Mode.FREEZE_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL)
PAIR: list[Spec] = [[1, "I", 6], ["I", 2, "I", 1]]


@torch.inference_mode()
def answer(model: Any, *turns: Any, **options: Any) -> Tensor:
    """Logits of the last turn; each goes on from the cache of the one before."""
    cache = DynamicCache(config=model.config.text_config)
    for inputs in turns:
        output = model(**inputs, past_key_values=cache, **options)
    logits: Tensor = output.logits
    return logits


def turn_after(batch: Any, ids: list[int]) -> dict[str, Tensor]:
    mask = batch.inputs["attention_mask"]
    ids_B1 = torch.tensor(ids)[:, None]
    longer = torch.cat([mask, torch.ones_like(ids_B1)], dim=1)
    return {"input_ids": ids_B1, "attention_mask": longer, "position_ids": mask.sum(1, keepdim=True)}


@pytest.mark.parametrize("modes", [FROZEN, DROPPED, LATE])
@pytest.mark.parametrize("executor", [executing, reference])
def test_interleaved_conversations_do_not_mix(executor: Any, modes: Modes) -> None:
    model = random_model()
    mine, other = batch_of("llava", PAIR), batch_of("llava", [["I", 2, "I", 1], [1, "I", 6]], seed=2)
    turn = turn_after(mine, [7, 8])
    with executor(model, modes), torch.inference_mode():
        alone = answer(model, mine.inputs, turn)
        first = model(**mine.inputs, use_cache=True).past_key_values
        copied = copy.deepcopy(first)
        model(**other.inputs, use_cache=True)
        assert torch.equal(model(**turn, past_key_values=first).logits, alone)
        assert torch.equal(model(**turn, past_key_values=copied).logits, alone)


def test_a_cache_of_another_plan_or_of_none_is_refused() -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    with torch.inference_mode():
        outside = model(**batch.inputs, use_cache=True).past_key_values
        with executing(model, DROPPED):
            dropped = model(**batch.inputs, use_cache=True).past_key_values
        for cache in (outside, dropped):
            with executing(model, FROZEN), pytest.raises(ShortVError, match="prefill inside the plan's context"):
                model(**turn_after(batch, [7, 8]), past_key_values=cache)


@pytest.mark.parametrize("executor", [executing, reference])
def test_a_part_of_the_model_is_refused(executor: Any) -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    with executor(model, FROZEN), torch.inference_mode():
        expected = model(**batch.inputs).logits
        for part in (model.model, model.forward):
            with pytest.raises(ShortVError, match="without the model around it"):
                part(**batch.inputs)
        assert torch.equal(model(**batch.inputs).logits, expected)


def test_a_forward_in_another_thread_is_refused_while_one_runs() -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    refused: list[str] = []

    def other() -> None:
        with torch.inference_mode():
            try:
                model(**batch.inputs)
            except ShortVError as error:
                refused.append(str(error))

    def in_between(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with executing(model, FROZEN), torch.inference_mode():
        expected = model(**batch.inputs).logits
        handle = model.model.language_model.norm.register_forward_hook(in_between)
        found = model(**batch.inputs).logits
        handle.remove()
        assert len(refused) == 1 and "another thread" in refused[0]
        assert torch.equal(found, expected)
        other()
        assert len(refused) == 1


def test_positional_arguments_count_as_much_as_named_ones() -> None:
    model, batch = random_model(), batch_of("llava", [[3, "I", 2], [1, "I", 1]])
    turn = turn_after(batch, [7, 8])
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids")
    cache = DynamicCache(config=model.config.text_config)
    with executing(model, LATE), torch.inference_mode():
        model(*(batch.inputs[name] for name in names), cache)
        found = model(*(turn.get(name) for name in names), cache).logits
        assert torch.equal(found, answer(model, batch.inputs, turn))
        with pytest.raises(ShortVError, match="static cache"):
            static = StaticCache(config=model.config.text_config, max_cache_len=32)
            model(*(batch.inputs[name] for name in names), static)


@pytest.mark.parametrize("modes", [FROZEN, DROPPED, (Mode.NO_VISUAL_QUERIES,) * LAYERS])
def test_a_mask_of_four_dimensions_tells_padding_as_well(modes: Modes) -> None:
    model, batch = random_model(), batch_of("llava", PAIR, padding="right")
    mask = batch.inputs["attention_mask"].bool()
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    sees = (causal & mask[:, None, :] & mask[:, :, None])[:, None]
    with executing(model, modes), torch.inference_mode():
        expected = model(**batch.inputs).logits[batch.types.text_BT]
        found = model(**{**batch.inputs, "attention_mask": sees}).logits[batch.types.text_BT]
    assert_law(found, expected)


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    model = random_model(attn="eager")
    batch, ends, pictures = (batch_of("llava", specs) for specs in (PAIR, [[3, "I"], [3]], [["I"]]))
    with torch.inference_mode(), executing(model, LATE):
        with pytest.raises(ShortVError, match="output_attentions"):
            model(**batch.inputs, output_attentions=True)
        with pytest.raises(ShortVError, match="ends with an image"):
            model(**ends.inputs)
        with pytest.raises(ShortVError, match="nothing but images"):
            model(**pictures.inputs)
        with pytest.raises(ShortVError, match="pass input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        model.model.language_model.layers[1].train()
        with pytest.raises(ShortVError, match="training mode"):
            model(**batch.inputs)
    with pytest.raises(Refused, match="ForConditionalGeneration"), executing(model.eval().model, FROZEN):
        pass
    with pytest.raises(Refused, match="frz"), executing(model, ("frz",) * LAYERS):  # type: ignore[arg-type]
        pass
    with pytest.raises(Refused, match="3 modes for a model of 4 layers"), reference(model, FROZEN[:3]):
        pass
    assert_fast_is_reference(model, FROZEN, partial(text_logits, model, ends))


def test_the_full_plan_refuses_nothing() -> None:
    model, batch = random_model(), batch_of("llava", [[3, "I", 2]])
    with torch.inference_mode(), executing(model, (Mode.FULL,) * LAYERS):
        static = StaticCache(config=model.config.text_config, max_cache_len=32)
        assert_law(model(**batch.inputs, past_key_values=static).logits, model(**batch.inputs).logits)
        assert torch.equal(model.forward(**batch.inputs).logits, model(**batch.inputs).logits)


def test_prompt_lookup_follows_a_plan_that_keeps_every_key_and_is_refused_by_one_that_does_not() -> None:
    model, batch = random_model(), batch_of("llava", [[3, "I", 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with executing(model, FROZEN):
        expected = model.generate(**batch.inputs, **options)
        assert torch.equal(model.generate(**batch.inputs, **options, prompt_lookup_num_tokens=2), expected)
    with executing(model, DROPPED), pytest.raises(ShortVError, match="assisted generation"):
        model.generate(**batch.inputs, **options, prompt_lookup_num_tokens=2)


def test_a_generated_placeholder_is_text() -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    turn = turn_after(batch, [model.config.image_token_id, 8])
    for modes in (FROZEN, DROPPED):
        assert_fast_is_reference(model, modes, partial(answer, model, batch.inputs, turn))


@pytest.mark.parametrize("kind", ["llava-mistral", "qwen2-vl", "internvl", "gemma3"])
def test_long_texts_attend_with_the_models_own_kernel(kind: str) -> None:
    """Few visual tokens and no padding: the explicit mask would cost more than the rows it saves."""
    model, batch = random_model(kind), batch_of(kind, [[60, "I", 40]])
    for mode in (Mode.FREEZE_VISUAL, Mode.NO_VISUAL_QUERIES, Mode.DROP_VISUAL):
        assert_fast_is_reference(model, (mode,) * LAYERS, partial(text_logits, model, batch))


def test_gradients_equal_those_of_the_reference() -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    weights = [model.get_input_embeddings().weight, model.model.language_model.layers[2].self_attn.k_proj.weight]
    for modes in (FROZEN, DROPPED, (Mode.NO_VISUAL_FFN,) * LAYERS):
        grads = []
        for executor in (reference, executing):
            for weight in weights:
                weight.requires_grad_(True).grad = None
            with executor(model, modes):
                model(**batch.inputs).logits[batch.types.text_BT].logsumexp(-1).sum().backward()
            grads.append([weight.grad.clone() for weight in weights])
        for expected, found in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [add_hook_to_module, remove_hook_from_module])
def test_hooks_that_come_or_go_inside_leave_the_models_own_forward(inside: Any) -> None:
    model, batch = random_model(), batch_of("llava", PAIR)
    layer = model.model.language_model.layers[1]
    expected = answer(model, batch.inputs)
    if inside is remove_hook_from_module:
        add_hook_to_module(layer, AlignDevicesHook())
    with executing(model, FROZEN):
        inside(layer, *([AlignDevicesHook()] if inside is add_hook_to_module else []))
    remove_hook_from_module(layer)
    assert torch.equal(answer(model, batch.inputs), expected)
    assert layer.forward.__func__ is type(layer).forward


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl", "gemma3"])
def test_text_after_the_images_may_be_prefilled_in_chunks(kind: str) -> None:
    model, batch = random_model(kind), batch_of(kind, [[1, "I", 12]])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "output_logits": True}
    for modes in (
        LATE,
        (Mode.BYPASS_VISUAL, Mode.FULL, Mode.FULL, Mode.BYPASS_VISUAL),
        (Mode.SKIP_ATTENTION, Mode.FREEZE_VISUAL, Mode.BYPASS_VISUAL, Mode.FULL),
    ):
        with executing(model, modes):
            whole = model.generate(**batch.inputs, **options, return_dict_in_generate=True)
            chunked = model.generate(**batch.inputs, **options, return_dict_in_generate=True, prefill_chunk_size=7)
        for found, expected in zip(chunked.logits, whole.logits, strict=True):
            assert_law(found, expected)


# An image that arrives after a sequence's first forward is refused: no plan may treat its rows as text.
WITH_LATE: Spec = [6, "I", 2]


def first_turn(model: nn.Module, batch: Batch) -> DynamicCache:
    cache: DynamicCache = model(input_ids=batch.inputs["input_ids"][:, :4], use_cache=True).past_key_values
    return cache


def pixels(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**later(batch), past_key_values=first_turn(model, batch)).logits
    return logits


def features(model: Any, batch: Batch) -> Tensor:
    inputs = later(batch)
    given = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}
    encoded = {"image": model.base_model.get_image_features(**given, return_dict=True)}
    grid = {name: value for name, value in given.items() if name == "image_grid_thw"}
    logits: Tensor = model(
        **inputs, **grid, mm_encoder_outputs=encoded, past_key_values=first_turn(model, batch)
    ).logits
    return logits


def generating(model: Any, batch: Batch, **options: Any) -> Tensor:
    options = options or {"past_key_values": first_turn(model, batch)}
    fixed: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    logits: Tensor = model.generate(**batch.inputs, **options, **fixed, return_dict_in_generate=True).logits[0]
    return logits


def later(batch: Batch) -> dict[str, Any]:
    """The inputs of a batch without its first four tokens, which are text."""
    inputs = dict(batch.inputs)
    for name in ("input_ids", "position_ids", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, 4:]
    if "position_ids" not in inputs:  # Qwen's models would compute positions, and expect the whole prompt for it
        inputs["position_ids"] = torch.arange(4, batch.types.text_BT.shape[1]).expand(3, 1, -1)
    return inputs


ROUTES: list[Callable[[Any, Batch], Tensor]] = [pixels, features, generating, partial(generating, prefill_chunk_size=4)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["llava", "llava-onevision", "qwen2.5-vl", "gemma3"])
def test_a_late_image_is_refused_by_a_plan_and_passes_a_full_one(
    kind: str, route: Callable[[Any, Batch], Tensor]
) -> None:
    model, batch = random_model(kind), batch_of(kind, [WITH_LATE])
    with torch.inference_mode():
        expected = route(model, batch)
        with executing(model, (Mode.FULL,) * LAYERS):
            assert torch.equal(route(model, batch), expected)
        with executing(model, FROZEN), pytest.raises(ShortVError, match="image arrives after"):
            route(model, batch)


@pytest.mark.parametrize("route", ROUTES)
def test_a_late_image_is_refused_under_learned_parts(route: Callable[[Any, Batch], Tensor]) -> None:
    model, batch = random_model(), batch_of("llava", [WITH_LATE])
    decoder = decoder_of(model)
    projectors = Projectors.build(decoder, ProjectorSettings(layers=tuple(range(LAYERS)), language_model="none"))
    routers = ExitRouters.build(decoder, RouterSettings(width=2))
    for modes, learned in (
        (FROZEN, Trained(parts=projectors)),
        ((Mode.FULL,) * LAYERS, Trained(parts=routers, threshold=0.5)),
    ):
        with (
            torch.inference_mode(),
            running(executing, model, modes, learned),
            pytest.raises(ShortVError, match="image arrives after"),
        ):
            route(model, batch)
