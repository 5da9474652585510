"""The sweep engine equals one naive ablated forward per layer, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortv.bench.sweep import measure_released
from shortv.costs import sweep_passes
from shortv.families import Batch, LoadedModel, encode, load
from shortv.layers.reference import reference
from shortv.plan import VISUAL_MODES, Mode, modes_of_ablation
from shortv.sample import Sample
from shortv.sweep import engine
from shortv.sweep.ablations import Ablation, ablate, run_clean
from shortv.sweep.engine import Divergence, divergence, kl_divergence, log_probabilities
from tests.law import SPECS, assert_law, some_specs
from tests.models import KINDS, LAYERS, Spec, batch_of, loaded, make_batch, prompts_of, random_model
from tests.tiny_model import TINY, bundled, calibration

MODES = tuple(mode for mode in Mode if mode is not Mode.FULL)


def naive(model: LoadedModel, batch: Batch, mode: Mode, layer: int) -> torch.Tensor:
    """Log-probabilities of a whole forward with hooks, as the released code measures them."""
    with (
        torch.inference_mode(),
        reference(model.model, modes_of_ablation(mode, layer, len(model.decoder.layers))),
    ):
        logits_BTV = model.model(**batch.inputs, use_cache=False).logits
    return log_probabilities(logits_BTV[torch.arange(len(logits_BTV)), batch.types.last_B])


def model_and_batch(kind: str, attn: str) -> tuple[LoadedModel, Batch]:
    """A random model, or the bundled one, with images of several sizes and a text alone."""
    if kind != "bundled":
        return loaded(random_model(kind, attn=attn)), batch_of(kind, SPECS)
    model = load(str(TINY / "model"), dtype="float32", attn_implementation=attn)
    text_only = Sample(sample_id="text", prompt="Describe the objects in this picture.")
    batch = encode(model, [*calibration()[:3], text_only]).batch
    assert batch is not None
    return model, batch


def ablated(model: LoadedModel, batch: Batch, modes: Sequence[Mode]) -> dict[Any, torch.Tensor]:
    layers = range(len(model.decoder.layers))
    with torch.inference_mode():
        clean = run_clean(model.decoder, batch, modes)
        found = ablate(model, batch, clean, layers, modes)
        return {ablation: log_probabilities(logits_BV) for ablation, logits_BV in found}


def assert_close(found: Divergence, expected: Divergence) -> None:
    """Within the tolerance that the demo's LC values keep."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(found[1], expected[1], atol=1e-7, rtol=1e-3)


def assert_same(first: engine.BatchLC, second: engine.BatchLC) -> None:
    assert first.values.keys() == second.values.keys()
    for ablation, value in first.values.items():
        assert_close(value, second.values[ablation])


@pytest.mark.parametrize(
    ("kind", "attn"),
    [*((kind, "sdpa") for kind in KINDS), ("llava", "eager"), ("gemma3", "eager"), ("bundled", "sdpa")],
)
def test_engine_equals_naive_forwards(kind: str, attn: str) -> None:
    """On random models, and on trained weights, where log-probabilities reach far lower."""
    model, batch = model_and_batch(kind, attn)
    measured = engine.measure(model, batch, layers=range(len(model.decoder.layers)), modes=MODES)
    for ablation, ablated_BV in ablated(model, batch, MODES).items():
        naive_BV = naive(model, batch, ablation.mode, ablation.layer)
        assert_law(ablated_BV, naive_BV)
        expected, found = divergence(measured.full_BV, naive_BV), measured.values[ablation]
        assert_close(found, expected)
        assert found[2].tolist() == expected[2].tolist()


def test_engine_equals_the_released_algorithm() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", SPECS)
    measured = engine.measure(model, batch, layers=range(LAYERS), modes=[Mode.FREEZE_VISUAL])
    for layer, expected in enumerate(measure_released(model, batch)):
        found = measured.values[Ablation(layer, Mode.FREEZE_VISUAL)]
        torch.testing.assert_close(found[0], expected[0], atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 4])
def test_noise_floor_is_rounding_and_the_largest_over_the_samples(count: int) -> None:
    model = bundled()
    encoded = encode(model, calibration()[:count])
    alone = [one.batch for sample in encoded.samples if (one := encode(model, [sample])).batch]
    assert encoded.batch is not None
    assert 0 <= engine.noise_floor(model, alone, encoded.batch) < 1e-9
    other = encode(model, [calibration()[count]]).batch
    assert other is not None
    for index in range(count if count > 1 else 0):
        # Any sample of the batch may be the noisy one.
        noisy = [*alone[:index], other, *alone[index + 1 :]]
        assert engine.noise_floor(model, noisy, encoded.batch) > 1e-7


@settings(max_examples=12, deadline=None)
@given(
    specs=some_specs,
    padding=st.sampled_from(["left", "right"]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
def test_any_image_place_and_padding_equals_naive(specs: list[Spec], padding: str, mode: Mode, seed: int) -> None:
    model = loaded(random_model("llava", seed=seed))
    batch = batch_of("llava", specs, padding=padding, seed=seed)
    for ablation, ablated_BV in ablated(model, batch, [mode]).items():
        naive_BV = naive(model, batch, mode, ablation.layer)
        assert_law(ablated_BV, naive_BV)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batch_of_eight_equals_eight_single_samples(padding: str) -> None:
    model = loaded(random_model())
    specs: list[Spec] = [*SPECS, [2, "I", "I", 3], [1, "I", 1], [12, "I", 4], ["I", 2]]
    together = engine.measure(model, batch_of("llava", specs, padding=padding), layers=range(LAYERS), modes=MODES)
    prompts = prompts_of("llava", specs)
    for number in range(len(specs)):
        alone = engine.measure(model, make_batch("llava", [prompts[number]]), layers=range(LAYERS), modes=MODES)
        for ablation, value in alone.values.items():
            row = Divergence(*(column[number : number + 1] for column in together.values[ablation]))
            assert_close(value, row)


def test_last_layer_and_prompts_without_image_have_exactly_zero_visual_lc() -> None:
    model = loaded(random_model())
    mixed = engine.measure(model, batch_of("llava", SPECS), layers=range(LAYERS), modes=MODES)
    text_only = engine.measure(model, batch_of("llava", [[4], [7]]), layers=range(LAYERS), modes=MODES)
    for layer in range(LAYERS):
        for mode in VISUAL_MODES:
            assert mixed.values[Ablation(layer, mode)][0][2] == 0
            assert text_only.values[Ablation(layer, mode)][0].tolist() == [0, 0]
        assert (text_only.values[Ablation(layer, Mode.FREEZE_TEXT)][0] > 1e-6).all()
    assert mixed.values[Ablation(LAYERS - 1, Mode.FREEZE_VISUAL)][0].tolist() == [0] * 4
    assert (mixed.values[Ablation(1, Mode.FREEZE_VISUAL)][0][[0, 1, 3]] > 1e-6).all()


@pytest.mark.parametrize("modes", [[Mode.FREEZE_VISUAL], [Mode.NO_VISUAL_QUERIES], [Mode.DROP_VISUAL], MODES])
def test_work_per_sweep_is_what_costs_predicts(modes: Sequence[Mode]) -> None:
    """Sequences that pass layers, FFNs and layers over text alone, counted inside the model."""
    model = loaded(random_model())
    batch = batch_of("llava", [[3, "I", 2], [1, "I", 9]])
    width = batch.types.text_BT.shape[1]
    calls = {"layers": 0, "ffn": 0, "text_layers": 0}

    def count(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls["layers" if output.shape[1] == width else "text_layers"] += len(output)

    def count_ffn(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls["ffn"] += len(output)

    for layer in model.decoder.layers:
        layer.register_forward_hook(count)
        model.decoder.ffn(layer).register_forward_hook(count_ffn)
    engine.measure(model, batch, layers=range(LAYERS), modes=modes)
    passes = [sweep_passes(LAYERS, mode) for mode in modes]
    layers = LAYERS + sum(each.layers for each in passes)
    text = sum(each.text_layers for each in passes)
    assert calls["layers"] == 2 * layers
    assert calls["text_layers"] == 2 * text
    assert calls["ffn"] == 2 * (layers + text + sum(each.ffn for each in passes))


def bypassed_by_hooks(model: LoadedModel, batch: Batch, layer: Any) -> torch.Tensor:
    """Log-probabilities where one layer's softmax has no visual keys and its visual rows are put back."""
    attention, visual = model.decoder.attention(layer), batch.types.visual_BT
    entered: list[torch.Tensor] = []

    def without_visual_keys(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone().expand(len(visual), -1, -1, -1).clone()
        lowest = torch.finfo(mask.dtype).min
        for row, columns in enumerate(visual):
            mask[row, :, batch.types.text_BT[row].nonzero()[:, 0][:, None], columns.nonzero()[:, 0]] = lowest
        return args, {**kwargs, "attention_mask": mask}

    def keep(_: Any, args: Any) -> None:
        entered.append(args[0].clone())

    def put_back(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[visual] = entered.pop()[visual]
        return output

    handles = [
        attention.register_forward_pre_hook(without_visual_keys, with_kwargs=True),
        layer.register_forward_pre_hook(keep),
        layer.register_forward_hook(put_back),
    ]
    try:
        with torch.inference_mode():
            logits_BTV = model.model(**batch.inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return log_probabilities(logits_BTV[torch.arange(len(visual)), batch.types.last_B])


@pytest.mark.parametrize("kind", ["bundled", "qwen3-vl", "gemma3"])
def test_lc_of_bypass_visual_equals_an_oracle_by_hooks(kind: str) -> None:
    model, batch = model_and_batch(kind, "eager")
    measured = engine.measure(
        model, batch, layers=range(len(model.decoder.layers)), modes=[Mode.BYPASS_VISUAL, Mode.FREEZE_VISUAL]
    )
    for index, layer in enumerate(model.decoder.layers):
        expected = divergence(measured.full_BV, bypassed_by_hooks(model, batch, layer))
        found = measured.values[Ablation(index, Mode.BYPASS_VISUAL)]
        assert_close(found, expected)
        with_images = batch.types.visual_BT.any(1)
        assert (found[0][with_images] > 1e-7).all()


def test_neither_stacks_nor_ranges_of_layers_change_a_value() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", SPECS)
    whole = engine.measure(model, batch, layers=range(LAYERS), modes=MODES)
    for stack in (1, 7):
        assert_same(whole, engine.measure(model, batch, layers=range(LAYERS), modes=MODES, stack=stack))
    parts = [engine.measure(model, batch, layers=range(a, b), modes=MODES) for a, b in [(0, 1), (1, LAYERS)]]
    assert_same(whole, replace(whole, values={**parts[0].values, **parts[1].values}))


def test_running_out_of_memory_halves_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(random_model())
    batch = batch_of("llava", SPECS)
    whole = engine.measure(model, batch, layers=range(LAYERS), modes=MODES)
    limit = 6 * len(SPECS)
    layer = model.decoder.layers[2]
    forward = layer.forward

    def small_device(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(hidden) > limit:
            raise torch.OutOfMemoryError("injected")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", small_device)
    assert_same(engine.measure(model, batch, layers=range(LAYERS), modes=MODES, stack=64), whole)
    limit = len(SPECS)
    assert_same(engine.measure(model, batch, layers=range(LAYERS), modes=MODES, stack=64), whole)
    limit = len(SPECS) - 1
    with pytest.raises(torch.OutOfMemoryError):
        engine.measure(model, batch, layers=range(LAYERS), modes=MODES, stack=64)


def test_failed_cpu_allocation_counts_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(random_model())

    def greedy(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty(2**55, dtype=torch.uint8)

    monkeypatch.setattr(model.decoder.layers[0], "forward", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        engine.measure(model, batch_of("llava", SPECS), layers=range(LAYERS), modes=MODES)


def test_non_finite_logits_name_their_sample_alone() -> None:
    model = loaded(random_model())
    batch = batch_of("llava", SPECS)
    batch.inputs["pixel_values"][1] = float("nan")  # the first image of the second prompt
    result = engine.measure(model, batch, layers=range(LAYERS), modes=MODES)
    assert result.finite_B.tolist() == [True, False, True, True]
    rows = result.records(["a", "b", "c", "d"])
    assert {row.sample_id for row in rows} == {"a", "c", "d"}
    assert len(rows) == 3 * len(MODES) * LAYERS


def test_kl_directions() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert kl_divergence(p, q).item() == pytest.approx(0.368064, abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(0.510826, abs=1e-6)
    value = divergence(p, q)
    assert value.kl_full_ablated_B.item() == pytest.approx(0.368064, abs=1e-6)
    assert kl_divergence(p, p).item() == 0
