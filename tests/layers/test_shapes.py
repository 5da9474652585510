"""Shapes have the sizes of the models they are named after."""

from __future__ import annotations

import pytest
import torch

from shortv.layers.shapes import SHAPES


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
    model_class, config = SHAPES[name].build(None)
    with torch.device("meta"):
        model = model_class._from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)
