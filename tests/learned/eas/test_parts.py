"""EAS's adapters: their formula, their size, their start, their routing in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortv.errors import Refused
from shortv.learned.eas.parts import Adapter, Adapters, Pia
from shortv.learned.eas.recipe import EasSettings, Shape
from shortv.learned.files import load_parts
from tests.models import LAYERS, loaded, random_model
from tests.parts import save_named, shuffled

SETTINGS = EasSettings(kept=(0, 2), skipped=(1, 3), kept_rank=4, pia_rank=6)


def test_parameter_counts_of_the_7b_model() -> None:
    with torch.device("meta"):
        kept, pia = Adapter(4096, 8, Shape()), Pia(4096, 32, Shape())
    assert sum(weight.numel() for weight in kept.parameters()) == 81_930
    assert sum(weight.numel() for weight in pia.parameters()) == 409_666


def test_the_weights_that_each_token_meets() -> None:
    model = loaded(random_model())
    parts = Adapters.build(model.decoder, SETTINGS)
    kept, pia, ffn = parts.kept["0"], parts.skipped["1"], model.architecture.intermediate_size
    once = sum(one.weight.numel() for one in (kept.down, kept.first, kept.second))
    # A fold has a column for each row of either up-projection's bottleneck and for its bias, behind gate and up.
    folded = pia.down.weight.numel() + 2 * ffn * (2 * SETTINGS.pia_rank + 2)
    assert parts.costs(model.architecture) == {"adapter_weights": 2 * once + 2 * folded}


def test_the_formula_written_out() -> None:
    torch.manual_seed(0)
    pia = Pia(12, 4, Shape(scale=0.7, temperature=5.0, pia_rank=4))
    for weight in pia.parameters():
        torch.nn.init.normal_(weight)
    tokens_TD = torch.randn(5, 12)
    first, second = (pia.routing(tokens_TD.mean(0)) / 5.0).softmax(-1)
    z = torch.stack([pia.context(token) for token in tokens_TD]).mean(0)
    expected = []
    for token in tokens_TD:
        inner = (pia.down(token) + z) / 2
        ups = [
            torch.cat([up.weight[:6] @ inner[:2], up.weight[6:] @ inner[2:]]) + up.bias
            for up in (pia.first, pia.second)
        ]
        expected.append(token + 0.7 * (first * ups[0] + second * ups[1]))
    found = pia(tokens_TD[None], *pia.summary(tokens_TD.mean(0)[None]))
    torch.testing.assert_close(found[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_fresh_adapters_change_nothing_unless_started_otherwise() -> None:
    decoder = loaded(random_model()).decoder
    rows_BTD = torch.randn(2, 3, 32)
    for start, same in (("identity", True), ("xavier", False)):
        parts = Adapters.build(decoder, EasSettings(kept=(0, 2), skipped=(1, 3), start=start))  # type: ignore[arg-type]
        for name, unchanged in (("kept", True), ("skipped", same)):
            for adapter in getattr(parts, name).values():
                found = adapter(rows_BTD, *adapter.summary(rows_BTD.mean(1)))
                assert torch.equal(found, rows_BTD) is unchanged


def test_adapters_come_back_in_the_models_dtype_and_their_routing_in_float32(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model = loaded(random_model().to(dtype))
    parts = shuffled(Adapters.build(model.decoder, SETTINGS))
    named = save_named(tmp_path, model, parts)
    found: Any = load_parts(named, model.decoder, model.architecture)
    assert found.settings == SETTINGS
    for name, value in found.state_dict().items():
        wanted = torch.float32 if ".routing." in name else dtype
        assert torch.equal(value, parts.state_dict()[name].to(wanted)), name
    weights, mean_BD = load_file(tmp_path / "parts.safetensors"), 300 * torch.randn(16, 32)
    logits_B2 = mean_BD @ weights["skipped.1.routing.weight"].T + weights["skipped.1.routing.bias"]
    expected_B2 = (logits_B2 / SETTINGS.temperature).softmax(-1).to(dtype)
    torch.testing.assert_close(found.skipped["1"].summary(mean_BD)[0], expected_B2)


def test_models_that_cannot_have_adapters_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="Gemma 3"):
        Adapters.build(loaded(random_model("gemma3")).decoder, SETTINGS)
    with pytest.raises(Refused, match=f"layer {LAYERS} does not exist"):
        Adapters.build(loaded(random_model()).decoder, EasSettings(kept=(LAYERS,), skipped=()))
