"""The reference executor is what its words say: rows put back, halves silenced, keys hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shortv.families import Batch, Decoder, LoadedModel
from shortv.layers.reference import reference
from shortv.layers.rows import Selection, explicit_mask, hide_keys
from shortv.plan import Mode, modes_of_ablation
from shortv.sweep.ablations import run_clean
from tests.law import SPECS
from tests.models import IMAGE_TOKEN, LAYERS, Spec, batch_of, loaded, make_batch, prompts_of, random_model


def logits(model: LoadedModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model.model(**batch.inputs, use_cache=False).logits
    return output


def states(model: LoadedModel, batch: Batch, modes: tuple[Mode, ...]) -> list[Tensor]:
    """The residual stream before layer 0 and after each layer."""
    found: list[Tensor] = []
    with torch.inference_mode(), reference(model.model, modes):
        first = model.decoder.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
        handles = [
            layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in model.decoder.layers
        ]
        model.model(**batch.inputs, use_cache=False)
        for handle in [first, *handles]:
            handle.remove()
    return found


def test_one_frozen_layer_keeps_visual_rows_and_computes_dense_text_rows() -> None:
    """Dense = overwrite = compact for text rows; only visual rows differ, and they equal the input."""
    model = loaded(random_model())
    batch = batch_of("llava", [[3, "I", 2], ["I", 7]])
    clean = run_clean(model.decoder, batch)
    visual = batch.types.visual_BT
    for layer in range(LAYERS):
        stream = states(model, batch, modes_of_ablation(Mode.FREEZE_VISUAL, layer, LAYERS))
        entered, left = stream[layer], stream[layer + 1]
        assert torch.equal(left[visual], entered[visual])
        assert torch.equal(left[batch.types.text_BT], clean.leaving[layer][batch.types.text_BT])
        compact = compact_frozen_layer(model.decoder, layer, clean.entering[layer], clean.arguments[layer], batch)
        torch.testing.assert_close(left[batch.types.text_BT], compact, atol=1e-5, rtol=1e-5)


def compact_frozen_layer(
    decoder: Decoder, index: int, hidden: Tensor, arguments: dict[str, Any], batch: Batch
) -> Tensor:
    """A frozen layer written out: text rows alone are queries and pass the FFN, every row gives K and V."""
    layer: Any = decoder.layers[index]
    attention, text = layer.self_attn, Selection.of(batch.types.text_BT)
    normed, heads = layer.input_layernorm(hidden), attention.head_dim

    def split(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, heads)).transpose(1, 2)

    def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    cos, sin = arguments["position_embeddings"]
    query = rotate(split(attention.q_proj(text.rows(normed))), text.rows(cos), text.rows(sin))
    key = rotate(split(attention.k_proj(normed)), cos, sin).repeat_interleave(attention.num_key_value_groups, 1)
    value = split(attention.v_proj(normed)).repeat_interleave(attention.num_key_value_groups, 1)
    length = hidden.shape[1]
    full = explicit_mask(
        arguments["attention_mask"], batch=len(hidden), queries=length, keys=length, device=hidden.device
    )
    rows = full.gather(2, text.index_BS[:, None, :, None].expand(-1, 1, -1, length))
    scores = (query @ key.transpose(2, 3) * attention.scaling).masked_fill(~rows, float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    middle = text.rows(hidden) + attention.o_proj(mixed)
    output: Tensor = middle + layer.mlp(layer.post_attention_layernorm(middle))
    return output[text.valid_BS]


def test_freezing_the_last_layer_leaves_text_logits_and_v_0_leaves_everything() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", SPECS)
    before = logits(model, batch)
    with reference(model.model, modes_of_ablation(Mode.FREEZE_VISUAL, LAYERS - 1, LAYERS)):
        assert torch.equal(logits(model, batch)[batch.types.text_BT], before[batch.types.text_BT])
    text_only = batch_of("llava", [[4], [9]])
    before = logits(model, text_only)
    for mode in (Mode.FREEZE_VISUAL, Mode.NO_VISUAL_QUERIES, Mode.NO_VISUAL_FFN, Mode.DROP_VISUAL):
        with reference(model.model, (mode,) * LAYERS):
            torch.testing.assert_close(logits(model, text_only), before, atol=1e-6, rtol=0)


def test_text_between_two_images_is_still_updated_and_causal() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", [[2, "I", 3, "I", 2]])
    modes = (Mode.FREEZE_VISUAL,) * LAYERS
    stream = states(model, batch, modes)
    between = slice(6, 9)
    assert batch.types.text_BT[0, between].all()
    assert not torch.allclose(stream[-1][0, between], stream[0][0, between])
    for state in stream[1:]:  # visual rows are the projector's output in every layer
        assert torch.equal(state[batch.types.visual_BT], stream[0][batch.types.visual_BT])
    changed = batch.inputs["input_ids"].clone()
    changed[0, -1] += 1 if changed[0, -1] < 89 else -1
    later = Batch(inputs={**batch.inputs, "input_ids": changed}, types=batch.types)
    assert torch.equal(states(model, later, modes)[-1][0, between], stream[-1][0, between])
    other_image = batch.inputs["pixel_values"].clone()
    other_image[1] += 1
    second = Batch(inputs={**batch.inputs, "pixel_values": other_image}, types=batch.types)
    assert torch.equal(states(model, second, modes)[-1][0, between], stream[-1][0, between])
    assert not torch.allclose(states(model, second, modes)[-1][0, -1], stream[-1][0, -1])


def test_dropping_visual_tokens_everywhere_is_the_language_model_without_them() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", [[3, "I", 2]])
    text = batch.types.text_BT[0]
    language: Any = model.model.model.language_model
    alone = language(
        inputs_embeds=language.embed_tokens(batch.inputs["input_ids"][:, text]),
        position_ids=torch.arange(len(text))[None, text],
    ).last_hidden_state
    expected = model.model.lm_head(alone)[0, -1]
    with reference(model.model, (Mode.DROP_VISUAL,) * LAYERS):
        torch.testing.assert_close(logits(model, batch)[0, -1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen3-vl"])
def test_generation_equals_prefilling_again_for_every_token(kind: str) -> None:
    """A padded batch with a cache, against single prompts that are prefilled from the start for each token."""
    model = random_model(kind)
    specs: list[Spec] = [[3, "I", 2], [6], ["I", 5, "I", 4]]
    batch = batch_of(kind, specs)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options["suppress_tokens"] = [IMAGE_TOKEN, IMAGE_TOKEN + 1]
    for mode in Mode:
        with torch.inference_mode(), reference(model, modes_of_ablation(mode, 1, LAYERS)):
            cached = model.generate(**batch.inputs, **options)[:, batch.types.text_BT.shape[1] :]
            for number, prompt in enumerate(prompts_of(kind, specs)):
                single = make_batch(kind, [prompt])
                again = model.generate(**single.inputs, **options, use_cache=False)
                assert again[0, single.types.text_BT.shape[1] :].tolist() == cached[number].tolist()


def test_hidden_keys_leave_no_row_empty() -> None:
    mask = explicit_mask(None, batch=1, queries=3, keys=3, device=torch.device("cpu"))
    hidden = torch.tensor([[True, False, False]])
    assert hide_keys(mask, hidden)[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, True, True],
    ]
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(hide_keys(additive, hidden) == 0, hide_keys(mask, hidden))
