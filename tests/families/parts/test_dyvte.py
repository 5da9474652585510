"""Routers: the paper's sizes, what they read, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu

from shortv.errors import Refused
from shortv.families.parts import load_parts, save_parts
from shortv.families.parts.dyvte import EXIT, ExitRouters, RouterSettings, TextRows, averaged
from shortv.families.tokens import TokenTypes
from shortv.plan import LearnedParts, PartsKind
from tests.models import LAYERS, loaded, random_model


@pytest.mark.parametrize(("layers", "width", "each"), [(32, 4096, 16_781_312), (40, 5120, 20_975_616)])
def test_parameters_of_the_papers_models(layers: int, width: int, each: int) -> None:
    parts = ExitRouters(layers, width, RouterSettings(), device="meta")
    assert [sum(p.numel() for p in router.parameters()) for router in parts.routers] == [each] * layers


def test_a_router_is_two_layers_without_bias_in_float32() -> None:
    torch.manual_seed(0)
    parts = ExitRouters(2, 3, RouterSettings(width=5))
    state_BE = torch.randn(4, 6)
    for layer, router in enumerate(parts.routers):
        logits_B2 = gelu(state_BE @ router.inner.weight.T) @ router.outer.weight.T
        expected_B = logits_B2.softmax(1)[:, EXIT]
        assert torch.allclose(parts.exit_probability(layer, state_BE), expected_B)
    assert parts.to(torch.bfloat16).exit_probability(0, state_BE.bfloat16()).dtype == torch.float32


def types_of(*rows: str) -> TokenTypes:
    """Positions spelled out: V visual, t text, - padding."""
    visual = torch.tensor([[kind == "V" for kind in row] for row in rows])
    return TokenTypes(visual_BT=visual, text_BT=torch.tensor([[kind == "t" for kind in row] for row in rows]))


@pytest.mark.parametrize(
    ("row", "after_image", "all_text"),
    [
        ("ttVVttt", (4, 5), (0, 1, 4, 5)),
        ("-tVtVtt", (5,), (1, 3, 5)),  # after the last image
        ("tVttt--", (2, 3), (0, 2, 3)),
        ("ttVVVVt", (6,), (0, 1)),  # one word after the image is its own mean
        ("-----Vt", (6,), (6,)),
        ("ttttttt", (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_which_text_is_averaged(row: str, after_image: tuple[int, ...], all_text: tuple[int, ...]) -> None:
    types = types_of(row, "ttVtttt")
    if "V" in row:
        assert tuple(averaged(types, "after-image")[0].nonzero()[:, 0].tolist()) == after_image
    assert tuple(averaged(types, "all-text")[0].nonzero()[:, 0].tolist()) == all_text


def test_states_are_the_same_among_all_rows_and_among_those_that_are_left() -> None:
    types = types_of("ttVVttt", "-tVtVtt", "tVttt--")
    hidden_BTD = torch.randn(3, 7, 4)
    hidden_BTD[~types.real_BT] = torch.nan
    rows = TextRows.of(types, "after-image")
    state_BE = rows.state(hidden_BTD.flatten(0, 1))
    expected = [(hidden_BTD[0, [4, 5]], 6), (hidden_BTD[1, [5]], 6), (hidden_BTD[2, [2, 3]], 4)]
    for sample, (averaged_KD, last) in enumerate(expected):
        wanted_E = torch.cat([averaged_KD.mean(0), hidden_BTD[sample, last]])
        assert torch.allclose(state_BE[sample], wanted_E)
    left_BT = types.text_BT | (types.visual_BT & torch.tensor([[False], [True], [False]]))
    assert torch.equal(rows.among(left_BT).state(hidden_BTD[left_BT]), state_BE)
    assert torch.equal(TextRows.of(types, "after-image", width=2).index_BM, rows.index_BM)


def test_routers_come_back_from_disk(tmp_path: Path) -> None:
    model = loaded(random_model())
    parts = ExitRouters.build(model.decoder, RouterSettings(width=7, mean_over="all-text"))
    digest = model.architecture.config_digest
    header = save_parts(tmp_path, parts, model="m", revision=None, config_digest=digest, training={})
    named = LearnedParts(kind=PartsKind.DYVTE, path=str(tmp_path), digest=header.digest, threshold=0.5)
    found = load_parts(named, model.decoder, model.architecture)
    assert isinstance(found, ExitRouters) and found.settings == parts.settings and len(found.routers) == LAYERS
    for name, tensor in parts.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_refusals() -> None:
    with pytest.raises(Refused, match="width"):
        RouterSettings(width=0)
    with pytest.raises(Refused, match="all-text"):
        ExitRouters.parse_settings({"width": 4, "mean_over": "some"})
    with pytest.raises(Refused, match="depth"):
        ExitRouters.parse_settings({"depth": 4})
    with pytest.raises(Refused, match="DeepStack"):
        ExitRouters.build(loaded(random_model("qwen3-vl")).decoder, RouterSettings())
    with pytest.raises(Refused, match="sliding windows"):
        ExitRouters.build(loaded(random_model("gemma3")).decoder, RouterSettings())
