"""Routers: the paper's sizes, what they read, float32 in a half-precision model, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu

from shortv.errors import Refused
from shortv.families.tokens import TokenTypes
from shortv.learned.dyvte.parts import EXIT, ExitRouters, TextRows, averaged
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.files import load_parts
from tests.models import LAYERS, loaded, random_model
from tests.parts import save_named


def test_parameters_of_the_papers_model() -> None:
    with torch.device("meta"):
        parts = ExitRouters(32, 4096, RouterSettings())
    assert [sum(p.numel() for p in router.parameters()) for router in parts.routers] == [16_781_312] * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_of_any_model_decide_with_the_float32_weights_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded(random_model().to(dtype))
    parts = ExitRouters.build(model.decoder, RouterSettings(width=7, mean_over="all-text"))
    named = save_named(tmp_path, model, parts, threshold=0.5)
    found = load_parts(named, model.decoder, model.architecture)
    assert isinstance(found, ExitRouters) and found.settings == parts.settings and len(found.routers) == LAYERS
    weights = load_file(tmp_path / "parts.safetensors")
    # Weights rounded to half precision would change a probability by about 0.01.
    state_BE = (30 * torch.randn(16, 64)).to(dtype)
    for layer in range(LAYERS):
        inner, outer = (weights[f"routers.{layer}.{name}.weight"] for name in ("inner", "outer"))
        logits_B2 = gelu(state_BE.float() @ inner.T) @ outer.T
        probability_B = found.exit_probability(layer, state_BE)
        torch.testing.assert_close(probability_B, logits_B2.softmax(1)[:, EXIT], atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize(("family", "why"), [("qwen3-vl", "DeepStack"), ("gemma3", "sliding windows")])
def test_families_whose_visual_tokens_cannot_leave_are_refused(family: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        ExitRouters.build(loaded(random_model(family)).decoder, RouterSettings())
