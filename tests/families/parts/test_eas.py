"""EAS's adapters: their formula, their size, their start, their settings on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from shortv.errors import Refused
from shortv.families.parts import load_parts, read_header, save_parts
from shortv.families.parts.eas import Adapter, Eas, EasSettings, GroupedUp, Pia
from shortv.plan import LearnedParts, PartsKind
from tests.models import LAYERS, loaded, random_model

OPTIONS: dict[str, Any] = {"groups": 2, "scale": 1.0, "temperature": 10.0}
SETTINGS = EasSettings(kept=(0, 2), skipped=(1, 3), kept_rank=4, pia_rank=6)


def shuffled(parts: Eas, *, seed: int = 0, size: float = 0.3) -> Eas:
    """Parts whose every weight and bias is drawn at random, as if long trained."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in parts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * size)
    return parts.requires_grad_(False)


def test_parameter_counts_of_the_7b_model() -> None:
    with torch.device("meta"):
        kept, pia = Adapter(4096, 8, **OPTIONS), Pia(4096, 32, **OPTIONS)
    assert sum(weight.numel() for weight in kept.parameters()) == 81_930
    assert sum(weight.numel() for weight in pia.parameters()) == 409_666


def test_the_weights_that_each_token_meets() -> None:
    model = loaded(random_model())
    parts = Eas.build(model.decoder, SETTINGS)
    kept, pia, ffn = parts.kept["0"], parts.skipped["1"], model.architecture.intermediate_size
    once = sum(one.weight.numel() for one in (kept.down, kept.first, kept.second))
    # A fold has a column for each row of either up-projection's bottleneck and for its bias, behind gate and up.
    folded = pia.down.weight.numel() + 2 * ffn * (2 * SETTINGS.pia_rank + 2)
    assert parts.costs(model.architecture) == {"adapter_weights": 2 * once + 2 * folded}


def test_the_formula_written_out() -> None:
    torch.manual_seed(0)
    pia = Pia(12, 4, groups=2, scale=0.7, temperature=5.0)
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


def test_the_dense_matrix_of_a_grouped_projection() -> None:
    up = GroupedUp(6, 10, 2)
    torch.nn.init.normal_(up.weight)
    rows = torch.randn(3, 6)
    torch.testing.assert_close(up(rows), rows @ up.dense_DR.T)


def test_fresh_adapters_change_nothing_unless_started_otherwise() -> None:
    decoder = loaded(random_model()).decoder
    rows_BTD = torch.randn(2, 3, 32)
    for start, same in (("identity", True), ("xavier", False)):
        parts = Eas.build(decoder, EasSettings(kept=(0, 2), skipped=(1, 3), start=start))
        for name, unchanged in (("kept", True), ("skipped", same)):
            for adapter in getattr(parts, name).values():
                found = adapter(rows_BTD, *adapter.summary(rows_BTD.mean(1)))
                assert torch.equal(found, rows_BTD) is unchanged


def test_saved_adapters_come_back(tmp_path: Path) -> None:
    model = loaded(random_model())
    parts = shuffled(Eas.build(model.decoder, SETTINGS))
    digest = model.architecture.config_digest
    header = save_parts(tmp_path, parts, model="random", revision=None, config_digest=digest, training={})
    named = LearnedParts(kind=PartsKind.EAS, path=str(tmp_path), digest=header.digest)
    again = load_parts(named, model.decoder, model.architecture)
    assert read_header(tmp_path) == header
    assert header.parameters == sum(weight.numel() for weight in parts.parameters()) and header.train_seconds is None
    assert again.settings == SETTINGS
    assert all(torch.equal(again.state_dict()[name], value) for name, value in parts.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": (0, 0)}, "not distinct"),
        ({"pia_rank": 7}, "multiple of 2 groups"),
        ({"temperature": 0.0}, "positive"),
        ({"start": "zero"}, "identity, xavier"),
        ({"depth": 3}, "no settings of EAS"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Eas.parse_settings(asdict(SETTINGS) | changes)


def test_models_that_cannot_have_adapters_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="Gemma 3"):
        Eas.build(loaded(random_model("gemma3")).decoder, SETTINGS)
    with pytest.raises(Refused, match="layer 7 does not exist"):
        Eas.build(loaded(random_model()).decoder, EasSettings(kept=(7,), skipped=()))
    assert LAYERS == 4
