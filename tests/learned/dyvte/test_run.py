"""DyVTE: each sample leaves at its own layer; a constant router is the drop-visual plan; never is the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from shortv.errors import Refused, ShortVError
from shortv.families import Batch, decoder_of
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.dyvte.run import exit_layers
from shortv.plan import Mode, modes_of_exit
from tests.law import assert_law, generated, text_logits
from tests.learned.cases import FULL, routers
from tests.models import IMAGE_TOKEN, LAYERS, Spec, batch_of, make_batch, prompts_of, random_model
from tests.parts import Trained, running

SPECS: list[Spec] = [[3, "I", 2], ["I", 5, "I", 4], [6], [1, "I", 9], [2, "I", 1]]


class Constant(ExitRouters):
    """Routers that fire at one layer and all later ones."""

    exit_at = LAYERS

    def exit_probability(self, layer: int, state_BE: Tensor) -> Tensor:
        return state_BE.new_full((len(state_BE),), float(layer >= self.exit_at))


def constant(model: Any, layer: int) -> Trained:
    parts = Constant.build(decoder_of(model), RouterSettings(width=2))
    parts.exit_at = layer
    return Trained(parts=parts, threshold=0.5)


@torch.inference_mode()
def prefill(model: Any, batch: Batch) -> Any:
    return model(**batch.inputs, use_cache=True)


@pytest.mark.parametrize("kind", ["llava", "internvl", "qwen2.5-vl"])
def test_constant_routers_are_the_drop_visual_plan(kind: str) -> None:
    model, batch = random_model(kind), batch_of(kind, SPECS)
    untouched = text_logits(model, batch)
    for layer in range(LAYERS + 1):
        with executing(model, modes_of_exit(layer, LAYERS)):
            expected, tokens = text_logits(model, batch), generated(model, batch)
        with running(executing, model, FULL, constant(model, layer)):
            assert_law(text_logits(model, batch), expected)
            assert generated(model, batch) == tokens
            assert exit_layers(prefill(model, batch).past_key_values) == [layer, layer, LAYERS, layer, layer]
        # At the last layer there is nothing left to leave; firing never is the model.
        assert torch.equal(expected, untouched) == (layer >= LAYERS - 1)
    assert torch.equal(text_logits(model, batch), untouched)


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_a_sample_of_a_batch_is_the_sample_alone_under_its_fixed_plan(kind: str) -> None:
    model, batch = random_model(kind), batch_of(kind, SPECS)
    learned = routers(model, seed=3)
    with running(executing, model, FULL, learned):
        output, tokens = prefill(model, batch), generated(model, batch)
    exits = exit_layers(output.past_key_values)
    assert exits is not None and len(set(exits)) > 1
    for row, prompt in enumerate(prompts_of(kind, SPECS)):
        single = make_batch(kind, [prompt])
        with running(executing, model, FULL, learned):
            alone = prefill(model, single)
            assert exit_layers(alone.past_key_values) == [exits[row]]
        assert_law(output.logits[row, -1], alone.logits[0, -1])
        with executing(model, modes_of_exit(exits[row], LAYERS)):
            assert_law(alone.logits[0, -1], prefill(model, single).logits[0, -1])
            assert generated(model, single)[0][-4:] == tokens[row][-4:]


def test_rows_that_left_are_in_no_product_and_in_no_cache() -> None:
    model = random_model()
    learned = routers(model, seed=3)
    batch = batch_of("llava", SPECS)
    rows: list[int] = []
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    with running(executing, model, FULL, learned):
        cache = prefill(model, batch).past_key_values
    exits = exit_layers(cache)
    assert exits is not None
    text, visual, width = batch.types.n_text, batch.types.n_visual, batch.types.text_BT.shape[1]
    for index, (found, layer) in enumerate(zip(rows, cache.layers, strict=True)):
        left = [t + (v if out >= index else 0) for t, v, out in zip(text, visual, exits, strict=True)]
        untouched = min(exits) >= index
        assert found == (len(SPECS) * width if untouched else sum(left))
        assert layer.keys.shape[2] == (width if untouched else max(left))
        assert layer.get_seq_length() == width


def test_a_later_turn_reads_what_each_layer_has_kept() -> None:
    model, batch = random_model("internvl"), batch_of("internvl", SPECS)
    learned = routers(model, seed=3)
    mask = batch.inputs["attention_mask"]
    ids = torch.randint(3, IMAGE_TOKEN, (len(SPECS), 3), generator=torch.Generator().manual_seed(0))
    turn = {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1)}
    turn["position_ids"] = mask.sum(1, keepdim=True) + torch.arange(3)
    found, exits = [], []
    for executor in (reference, executing):
        with torch.inference_mode(), running(executor, model, FULL, learned):
            cache = prefill(model, batch).past_key_values
            found.append(model(**turn, past_key_values=cache).logits)
            exits.append(exit_layers(cache))
    assert_law(found[1], found[0])
    assert exits[0] == exits[1]


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device, while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.count = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("tolist", "item", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__", "cpu")
        self.count += self.on and getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_a_layer_until_everybody_has_left() -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    waits, text = Waits(), model.model.language_model
    text.layers[0].register_forward_pre_hook(lambda *_: setattr(waits, "on", True))
    text.norm.register_forward_pre_hook(lambda *_: setattr(waits, "on", False))
    for layer, expected in [(0, 1), (1, 2), (LAYERS - 1, LAYERS - 1), (LAYERS, LAYERS - 1)]:
        with running(executing, model, FULL, constant(model, layer)), waits:
            waits.count = 0
            prefill(model, batch)
        assert waits.count == expected


def test_refusals() -> None:
    model = random_model()
    learned = constant(model, 0)
    with (
        pytest.raises(Refused, match="make all full"),
        running(executing, model, (Mode.FREEZE_VISUAL,) * LAYERS, learned),
    ):
        pass
    with pytest.raises(Refused, match="0 to 1"), running(executing, model, FULL, Trained(parts=learned.parts)):
        pass
    short = Trained(parts=ExitRouters(LAYERS - 1, 32, RouterSettings(width=2)), threshold=0.5)
    with pytest.raises(Refused, match="one router per layer"), running(executing, model, FULL, short):
        pass
    batch, ends = batch_of("llava", [[3, "I", 9]]), batch_of("llava", [[3, "I"]])
    with torch.inference_mode(), running(executing, model, FULL, learned):
        with pytest.raises(ShortVError, match="ends with an image"):
            model(**ends.inputs)
        with pytest.raises(ShortVError, match="assisted generation"):
            generated(model, batch, prompt_lookup_num_tokens=2)
        cache = DynamicCache(config=model.config.text_config)
        text_logits(model, batch, past_key_values=cache)
    with (
        torch.inference_mode(),
        running(executing, model, FULL, constant(model, 0)),
        pytest.raises(ShortVError, match="prefill inside the plan's context"),
    ):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
