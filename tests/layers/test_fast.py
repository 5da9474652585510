"""The law: for every family, mode and layer the fast executor equals the reference, and undoes itself."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import shortv
from shortv.architecture import Architecture
from shortv.costs import plan_flops
from shortv.errors import Refused
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.plan import WORK, Mode, Plan, Tokens, modes_of_ablation, modes_of_layers
from tests.law import SPECS, assert_fast_is_reference, assert_law, generated, in_dtype, some_specs, text_logits
from tests.models import IMAGE_TOKEN, KINDS, LAYERS, VISION_START, Spec, batch_of, random_model

Modes = tuple[Mode, ...]
FULL: Modes = (Mode.FULL,) * LAYERS


def drawn(seed: int) -> Modes:
    """Random modes, any after any other."""
    return tuple(random.Random(seed).choices(list(Mode), k=LAYERS))


UNIFORM: list[Modes] = [(mode,) * LAYERS for mode in Mode if mode is not Mode.FULL]
MIXED: list[Modes] = [
    modes_of_layers(Mode.FREEZE_VISUAL, (0, 2, 3), LAYERS),  # the published pattern: first and deep layers
    (Mode.BYPASS_VISUAL, Mode.FULL, Mode.FULL, Mode.BYPASS_VISUAL),
    (Mode.FULL, Mode.BYPASS_VISUAL, Mode.FREEZE_VISUAL, Mode.FULL),
    *(drawn(seed) for seed in range(4)),
]
ABLATIONS: list[Modes] = [
    modes_of_ablation(mode, layer, LAYERS) for mode, layer in product(Mode, range(LAYERS)) if mode is not Mode.FULL
]


@pytest.mark.parametrize(
    ("attn", "padding", "plans"),
    [
        ("sdpa", "left", [*UNIFORM, *MIXED, *ABLATIONS]),
        ("sdpa", "right", [*UNIFORM, *MIXED[:1]]),
        ("eager", "left", [*UNIFORM, *MIXED[:1]]),
    ],
    ids=["all", "right", "eager"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_reference(kind: str, attn: str, padding: str, plans: list[Modes]) -> None:
    model = random_model(kind, attn=attn)
    batch = batch_of(kind, SPECS, padding=padding)
    before = text_logits(model, batch)
    for number, modes in enumerate(plans):
        cached = {"use_cache": bool(number % 2)}
        assert_fast_is_reference(model, modes, partial(text_logits, model, batch, **cached))
    for executor in (executing, reference):
        with executor(model, FULL):
            assert torch.equal(text_logits(model, batch), before)
        with pytest.raises(KeyError), executor(model, plans[0]):
            text_logits(model, batch)
            raise KeyError("a user's own error")
    assert torch.equal(text_logits(model, batch), before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"num_beams": 3}) for kind in ("llava", "qwen2-vl", "gemma3")),
        *((kind, {"use_cache": False}) for kind in ("llava", "qwen2-vl", "gemma3")),
    ],
)
def test_generation_equals_reference(kind: str, options: dict[str, Any]) -> None:
    """Plans with layer 0 skipped and layer 0 dropped among them: its cache tells transformers the sequence length."""
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    for modes in [*UNIFORM, *MIXED[1:5]]:
        with reference(model, modes):
            expected = generated(model, batch, **options)
        with executing(model, modes):
            assert generated(model, batch, **options) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llava", "internvl", "qwen3-vl", "gemma3"])
def test_half_precision_is_as_near_to_the_truth_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    truth, half = random_model(kind), random_model(kind).to(dtype)
    batch = batch_of(kind, SPECS)
    halved = in_dtype(batch, dtype)
    for modes in [*UNIFORM, *MIXED[1:3]]:
        with reference(truth, modes):
            exact = text_logits(truth, batch)
        with reference(half, modes):
            slow = (text_logits(half, halved).float() - exact).abs().mean()
        with executing(half, modes):
            fast = (text_logits(half, halved).float() - exact).abs().mean()
        assert fast <= 2 * slow


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    specs=some_specs,
    padding=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 10_000),
)
def test_any_plan_on_any_prompt(kind: str, specs: list[Spec], padding: str, seed: int) -> None:
    model, modes = random_model(kind), drawn(seed)
    batch = batch_of(kind, specs, padding=padding, seed=seed)

    def run() -> tuple[Tensor, Any]:
        return text_logits(model, batch), model.generate(
            **batch.inputs,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[IMAGE_TOKEN, IMAGE_TOKEN + 1, VISION_START],
            output_logits=True,
            return_dict_in_generate=True,
        )

    with reference(model, modes):
        expected, expected_run = run()
    with executing(model, modes):
        found, found_run = run()
    assert_law(found, expected)
    for step, (found_BV, expected_BV) in enumerate(zip(found_run.logits, expected_run.logits, strict=True)):
        # A tie may be broken either way, and what follows differs then.
        length = batch.types.text_BT.shape[1] + step
        same_B = (found_run.sequences[:, :length] == expected_run.sequences[:, :length]).all(1)
        if padding == "left" and same_B.any():
            assert_law(found_BV[same_B], expected_BV[same_B])


@pytest.mark.parametrize("mode", Mode)
def test_products_of_a_mixed_batch_are_those_that_costs_predicts(mode: Mode) -> None:
    """Counted by torch in a layer inside a run; rows that a mode leaves out are in no product, and no padding is."""
    model = random_model()
    batch = batch_of("llava", [[20, "I", 1], [2, "I", "I", 1], [9]])
    arch = Architecture.from_config_dict(model.config.to_dict())
    flops = FlopCounterMode(display=False)
    with executing(model, (mode,) * LAYERS), flops:
        text_logits(model, batch)
    counts = flops.get_flop_counts()[f"{type(model).__name__}.model.language_model.layers.1"]
    found = sum(count for operator, count in counts.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    every, text = batch.types.text_BT.numel(), sum(batch.types.n_text)
    rows = {Tokens.ALL: every, Tokens.TEXT: text, Tokens.VISUAL: sum(batch.types.n_visual), Tokens.NONE: 0}
    queries, keys, ffn = (rows[tokens] for tokens in WORK[mode])
    alone = dataclasses.replace(arch, num_layers=1)
    pairs = 4 * queries * keys * arch.num_heads * arch.head_dim  # scores and mixing are not products of weights
    assert found == 4 * arch.hidden_size * arch.head_dim * (queries * arch.num_heads + keys * arch.num_kv_heads) + (
        6 * ffn * arch.hidden_size * arch.intermediate_size
    )
    if {queries, keys, ffn} <= {text, every}:
        assert found + pairs == plan_flops(alone, [mode], text, every - text)


@pytest.mark.parametrize("executor", [executing, reference])
def test_visual_tokens_never_come_back_after_a_drop(executor: Any) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)

    def run(*modes: Mode) -> Tensor:
        with executor(model, modes):
            return text_logits(model, batch)

    dropped = run(Mode.FULL, Mode.DROP_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL)
    assert_law(run(Mode.FULL, Mode.BYPASS_VISUAL, Mode.BYPASS_VISUAL, Mode.BYPASS_VISUAL), dropped)
    assert_law(run(Mode.FULL, Mode.DROP_VISUAL, Mode.FULL, Mode.FREEZE_VISUAL), dropped)
    assert (run(Mode.FULL, Mode.BYPASS_VISUAL, Mode.FULL, Mode.FULL) - dropped).abs().max() > 0.01
    skipped = run(Mode.FULL, Mode.BYPASS_VISUAL, Mode.SKIP_ATTENTION, Mode.BYPASS_VISUAL)
    assert_law(run(Mode.FULL, Mode.DROP_VISUAL, Mode.SKIP_ATTENTION, Mode.FULL), skipped)


def test_dropped_layers_keep_no_visual_keys_and_skipped_ones_none() -> None:
    model = random_model()
    batch = batch_of("llava", [[3, "I", 2]])
    for modes, lengths in {
        (Mode.SKIP_ATTENTION, Mode.FREEZE_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL): [0, 9, 5, 5],
        (Mode.BYPASS_VISUAL, Mode.FULL, Mode.BYPASS_VISUAL, Mode.FREEZE_VISUAL): [5, 9, 5, 9],
        (Mode.FULL, Mode.DROP_VISUAL, Mode.FULL, Mode.SKIP_ATTENTION): [9, 5, 5, 0],
    }.items():
        with torch.inference_mode(), executing(model, modes):
            cache = model(**batch.inputs, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == lengths
        assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9, 9]


@pytest.mark.parametrize("asked", ["call", "config"])
def test_hidden_states_have_every_row_under_every_plan(asked: str) -> None:
    model = random_model()
    batch = batch_of("llava", SPECS)
    model.config.text_config.output_hidden_states = asked == "config"
    for modes in UNIFORM:
        with torch.inference_mode(), executing(model, modes):
            states = model(**batch.inputs, output_hidden_states=True).hidden_states
        assert {state.shape[:2] for state in states} == {batch.types.text_BT.shape}


def plan_for(model: Any, modes: Modes, **changes: Any) -> Plan:
    digest = Architecture.from_config_dict(model.config.to_dict()).config_digest
    return Plan(**{"name": "p", "model": "m", "config_digest": digest, "num_layers": LAYERS, "modes": modes, **changes})


def test_apply_takes_a_plan_or_its_file_and_undoes_itself_after_an_error(tmp_path: Any) -> None:
    model = random_model()
    batch = batch_of("llava", SPECS)
    before = text_logits(model, batch)
    plan = plan_for(model, (Mode.FREEZE_VISUAL,) * LAYERS)
    plan.save(tmp_path)
    with shortv.apply(model, plan):
        inside = text_logits(model, batch)
    assert not torch.equal(inside, before)
    with pytest.raises(KeyError), shortv.apply(model, tmp_path):
        assert torch.equal(text_logits(model, batch), inside)
        raise KeyError("a user's own error")
    assert torch.equal(text_logits(model, batch), before)
    assert not any("forward" in layer.__dict__ for layer in model.model.language_model.layers)


def test_hooks_that_move_a_layers_inputs_still_run() -> None:
    """accelerate spreads a model over devices by hooks around each layer."""
    model = random_model()
    batch = batch_of("llava", SPECS)
    seen: list[int] = []

    class Counting(AlignDevicesHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0].shape[1])
            return super().pre_forward(module, *args, **kwargs)

    with executing(model, (Mode.FREEZE_VISUAL,) * LAYERS):
        expected = text_logits(model, batch)
    for layer in model.model.language_model.layers:
        add_hook_to_module(layer, Counting(execution_device="cpu"))
    forwards = [layer.forward for layer in model.model.language_model.layers]
    with executing(model, (Mode.FREEZE_VISUAL,) * LAYERS):
        assert torch.equal(text_logits(model, batch), expected)
    assert seen == [batch.types.text_BT.shape[1], *[sum(batch.types.n_text)] * (LAYERS - 1)]
    assert [layer.forward for layer in model.model.language_model.layers] == forwards
    remove_hook_from_module(model, recurse=True)


def test_refusals() -> None:
    model = random_model()
    freeze = (Mode.FREEZE_VISUAL,) * LAYERS
    with pytest.raises(Refused, match="has 4"), shortv.apply(model, plan_for(model, freeze + freeze, num_layers=8)):
        pass
    with (
        pytest.raises(Refused, match="architecture"),
        shortv.apply(model, plan_for(model, freeze, config_digest="0" * 64)),
    ):
        pass
    with executing(model, freeze), pytest.raises(Refused, match="already under a plan"), executing(model, FULL):
        pass
    with pytest.raises(Refused, match="training mode"), executing(model.train(), freeze):
        pass
    model.eval()
    model.set_attn_implementation("eager")
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(Refused, match="load the model with one of"), executing(model, freeze):
        pass
