"""The prefill bench measures what it says and leaves the model as it was."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from shortv.architecture import Architecture
from shortv.costs import flops_ratio
from shortv.families import decoder_of
from shortv.layers import roofline
from shortv.layers.apply import executing
from shortv.layers.bench import Workload, bench_prefill
from shortv.layers.shapes import SHAPES
from shortv.plan import Mode, modes_of_layers
from tests.models import KINDS, LAYERS, batch_of, random_model


@pytest.mark.parametrize("mode", Mode)
def test_with_endless_bandwidth_the_roofline_is_the_flops_ratio(mode: Mode) -> None:
    architecture = Architecture.from_config_dict(random_model().config.to_dict())
    device = roofline.Device(flops=1e9, bandwidth=math.inf)
    full, modes = (Mode.FULL,) * LAYERS, (mode,) * LAYERS

    def least(modes: tuple[Mode, ...]) -> float:
        return roofline.roofline_seconds(architecture, modes, batch=3, t=7, v=50, itemsize=4, device=device)

    assert least(modes) / least(full) == pytest.approx(flops_ratio(architecture, modes, 7, 50))


def test_with_endless_flops_the_weights_bound_a_frozen_layer() -> None:
    architecture = Architecture.from_config_dict(random_model().config.to_dict())
    device = roofline.Device(flops=math.inf, bandwidth=1e9)
    weights = 32 * 48 * 2 + 32 * 24 * 2 + 3 * 32 * 48
    seconds = roofline.roofline_seconds(
        architecture, [Mode.FREEZE_VISUAL], batch=1, t=1, v=1, itemsize=4, device=device
    )
    assert weights * 4 / 1e9 < seconds < 1.2 * weights * 4 / 1e9


@pytest.mark.parametrize("kind", KINDS)
def test_bench_prefill_times_every_executor_and_restores_the_depth(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 2**16})
    model: Any = random_model(kind)
    batch = batch_of(kind, [[3, "I", 2]])
    before = model(**batch.inputs).logits
    modes = (Mode.FULL, Mode.FULL, Mode.FREEZE_VISUAL, Mode.FREEZE_VISUAL)
    work = Workload(batch=2, text_tokens=8, visual_tokens=100)
    seen = {
        name: batch.inputs[name] for name in ("pixel_values", "image_grid_thw", "image_sizes") if name in batch.inputs
    }
    result = bench_prefill(model, modes, work, pairs=1, pixels=seen)
    assert result.tower > 0 and min(result.fast_ratio, 1) < result.tower_ratio < max(result.fast_ratio, 1)
    assert min(result.full, result.fast, result.reference, result.fast_ratio, result.roofline_ratio) > 0
    architecture = Architecture.from_config_dict(model.config.to_dict())
    assert result.flops_ratio == pytest.approx(flops_ratio(architecture, modes, 8, 100))
    assert len(decoder_of(model).layers) == LAYERS
    assert torch.equal(model(**batch.inputs).logits, before)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_built_and_sees_as_many_tokens_as_it_says(name: str) -> None:
    """Sizes only: the weights have no storage."""
    shape = SHAPES[name]
    model_class, config = shape.build(2)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
        given = {
            key: value.to("meta") if value.is_floating_point() else value
            for key, value in shape.pixels(1, shape.visual_tokens).items()
        }
    assert len(model.model.language_model.layers) == 2
    patches = sum(value.numel() for value in given.values() if value.is_floating_point()) / (3 * 14 * 14)
    per_token = {"qwen2_5_vl": 8}.get(config.model_type, 1)
    assert patches == pytest.approx(per_token * shape.visual_tokens * (336 / 14) ** 2 / 576)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2,)], ids=["all", "one"])
@pytest.mark.parametrize(
    ("batch", "images", "text", "visual"),
    [(1, 1, 64, 576), (1, 1, 64, 256), (1, 1, 1000, 256), (1, 1, 2500, 256), (4, 1, 300, 256), (4, 4, 64, 256)],
)
def test_freezing_is_never_slower(batch: int, images: int, text: int, visual: int, layers: tuple[int, ...]) -> None:
    """Also where the text is most of the prompt, or most of the batch."""
    model = random_model()
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "head_dim": 128}
    model.config.text_config.update({**sizes, "num_key_value_heads": 8, "max_position_embeddings": 4096})
    model = type(model)(model.config).eval()
    input_ids = torch.randint(3, 80, (batch, text + visual))
    input_ids[:images, 5 : 5 + visual] = model.config.image_token_id
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "logits_to_keep": 1}
    frozen = modes_of_layers(Mode.FREEZE_VISUAL, layers, LAYERS)

    def seconds(modes: tuple[Mode, ...]) -> float:
        with torch.inference_mode(), executing(model, modes):
            return roofline.seconds(lambda: model(**inputs), torch.device("cpu"))

    seconds(frozen)
    ratios = [seconds(frozen) / seconds((Mode.FULL,) * LAYERS) for _ in range(9)]
    assert statistics.median(ratios) <= 1.02
