"""Benchmark models have the sizes of the published models."""

from __future__ import annotations

import pytest
import torch

from shortv.bench.models import MODELS


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.06),
        ("llava-1.5-13b", 13.35),
        ("llava-next-7b", 7.06),
        ("llava-next-13b", 13.35),
        ("qwen2.5-vl-7b", 8.29),
    ],
)
def test_parameters_of_the_published_models(name: str, billions: float) -> None:
    assert MODELS[name].parameters() / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].real_tower])
def test_pixels_give_the_stated_number_of_visual_tokens(name: str) -> None:
    shape = MODELS[name]
    model_class, config = shape.build(layers=2)
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
