"""FLOPs against the tables of the papers, and the modes against each other."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv.architecture import Architecture
from shortv.costs import Passes, ablation_passes, flops_ratio, layer_flops, plan_flops, sweep_passes, visual_tokens_at
from shortv.errors import Refused
from shortv.plan import VISUAL_MODES, Mode
from tests.architectures import architecture

SMALL = architecture(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
LARGE = dataclasses.replace(
    SMALL, num_layers=40, hidden_size=5120, intermediate_size=13824, num_heads=40, num_kv_heads=40
)
MODELS = {"1.5-7B": (SMALL, 576), "1.5-13B": (LARGE, 576), "NeXT-7B": (SMALL, 2880), "NeXT-13B": (LARGE, 2880)}
T = 64

# ShortV table 11: replaced layers, then TFLOPs and ratio as printed, then TFLOPs by the paper's own formula.
TABLE_11 = {
    "1.5-7B": [(0, 8.5, 100, 8.5040), (8, 6.9, 81, 6.8999), (19, 4.7, 55, 4.6941), (28, 2.9, 34, 2.8894)],
    "1.5-13B": [(0, 16.6, 100, 16.5759), (16, 11.6, 70, 11.5749), (24, 9.1, 55, 9.0745), (36, 5.3, 32, 5.3237)],
    "NeXT-7B": [(0, 42.7, 100, 42.6748), (4, 38.3, 90, 38.2295), (19, 21.6, 51, 21.5597), (24, 16.0, 37, 16.0030)],
    "NeXT-13B": [(0, 81.8, 100, 81.8057), (16, 54.6, 67, 54.6266), (24, 41.0, 50, 41.0371), (32, 27.5, 34, 27.4475)],
}
# The paper rounds up some TFLOPs and divides rounded TFLOPs for some ratios.
TERAFLOPS_OFF = {("NeXT-7B", 4), ("NeXT-13B", 32)}
RATIOS_OFF = {("NeXT-7B", 24)}
ROWS = [(model, *row) for model, rows in TABLE_11.items() for row in rows]


def replaced(arch: Architecture, count: int, mode: Mode = Mode.FREEZE_VISUAL) -> list[Mode]:
    return [Mode.FULL] * (arch.num_layers - count) + [mode] * count


@pytest.mark.parametrize(("model", "count", "printed", "percent", "computed"), ROWS)
def test_shortv_table_11(model: str, count: int, printed: float, percent: int, computed: float) -> None:
    arch, v = MODELS[model]
    modes = replaced(arch, count)
    tera = plan_flops(arch, modes, T, v) / 1e12
    ratio = 100 * flops_ratio(arch, modes, T, v)
    assert tera == pytest.approx(computed, abs=5.1e-5)
    assert tera == pytest.approx(printed, abs=0.1)
    assert ratio == pytest.approx(percent, abs=1)
    assert (round(tera, 1) != printed) == ((model, count) in TERAFLOPS_OFF)
    assert (round(ratio) != percent) == ((model, count) in RATIOS_OFF)


def test_exact_values_of_the_7b_models() -> None:
    for mode, flops in {
        Mode.FULL: 265_751_101_440,
        Mode.FREEZE_VISUAL: 65_229_815_808,
        Mode.NO_VISUAL_QUERIES: 221_056_598_016,
        Mode.NO_VISUAL_FFN: 109_924_319_232,
        Mode.SKIP_ATTENTION: 6 * 640 * 4096 * 11008,  # EAS
    }.items():
        assert layer_flops(SMALL, mode, T, 576) == layer_flops(SMALL, mode, float(T), 576.0) == flops
    assert plan_flops(SMALL, replaced(SMALL, 19), T, 576) == 4_694_130_819_072


def test_grouped_queries_and_heads_wider_than_the_model() -> None:
    """Counted by hand: h 8, q 3x4 = 12, kv 1x4 = 4, m 10, 2 text and 3 visual tokens."""
    arch = dataclasses.replace(
        SMALL, num_layers=1, hidden_size=8, intermediate_size=10, num_heads=3, num_kv_heads=1, head_dim=4
    )
    q_and_o, k_and_v, ffn = 2 * 2 * 8 * 12, 2 * 2 * 8 * 4, 2 * 3 * 8 * 10  # per token
    pair = 2 * 2 * 12  # per query and key
    expected = {
        Mode.FULL: 5 * (q_and_o + k_and_v + ffn) + 25 * pair,
        Mode.FREEZE_VISUAL: 2 * (q_and_o + ffn) + 5 * k_and_v + 10 * pair,
        Mode.FREEZE_TEXT: 3 * (q_and_o + ffn) + 5 * k_and_v + 15 * pair,
        Mode.NO_VISUAL_QUERIES: 2 * q_and_o + 5 * (k_and_v + ffn) + 10 * pair,
        Mode.NO_VISUAL_FFN: 5 * (q_and_o + k_and_v) + 2 * ffn + 25 * pair,
        Mode.SKIP_ATTENTION: 5 * ffn,
        Mode.DROP_VISUAL: 2 * (q_and_o + k_and_v + ffn) + 4 * pair,
        Mode.BYPASS_VISUAL: 2 * (q_and_o + k_and_v + ffn) + 4 * pair,
    }
    assert {mode: layer_flops(arch, mode, 2, 3) for mode in Mode} == expected


@given(t=st.integers(1, 4096), v=st.integers(0, 4096), mode=st.sampled_from(list(Mode)))
def test_no_mode_costs_more_than_full(t: int, v: int, mode: Mode) -> None:
    full, found = layer_flops(SMALL, Mode.FULL, t, v), layer_flops(SMALL, mode, t, v)
    assert isinstance(found, int)
    assert found <= full
    if v == 0 and mode in VISUAL_MODES:
        assert found == full


@given(t=st.integers(1, 4096), v=st.integers(1, 4096), share=st.floats(0.01, 0.99))
def test_fewer_visual_tokens_cost_the_share_that_was_asked_for(t: int, v: int, share: float) -> None:
    fewer, wanted = visual_tokens_at(SMALL, share, t, v), share * layer_flops(SMALL, Mode.FULL, t, v)
    assert 0 <= fewer < v
    assert layer_flops(SMALL, Mode.FULL, t, fewer) == pytest.approx(max(wanted, layer_flops(SMALL, Mode.FULL, t, 0)))


def test_after_a_drop_no_layer_works_on_visual_tokens() -> None:
    """Two text and three visual tokens; the second layer drops the visual ones, whatever the third one's mode is."""
    drop = layer_flops(SMALL, Mode.DROP_VISUAL, 2, 3)
    for mode, last in {
        Mode.FULL: drop,
        Mode.FREEZE_VISUAL: drop,
        Mode.BYPASS_VISUAL: drop,
        Mode.SKIP_ATTENTION: layer_flops(SMALL, Mode.SKIP_ATTENTION, 2, 0),
        Mode.FREEZE_TEXT: layer_flops(SMALL, Mode.FREEZE_TEXT, 2, 0),
    }.items():
        arch = dataclasses.replace(SMALL, num_layers=3)
        found = plan_flops(arch, [Mode.FULL, Mode.DROP_VISUAL, mode], 2, 3)
        assert found == layer_flops(SMALL, Mode.FULL, 2, 3) + drop + last


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(Refused, match="v=-1"):
        layer_flops(SMALL, Mode.FULL, 1, -1)
    with pytest.raises(Refused, match="t=nan"):
        layer_flops(SMALL, Mode.FULL, float("nan"), 1.0)
    with pytest.raises(Refused, match="at least one token"):
        flops_ratio(SMALL, [Mode.FULL] * 32, 0, 0)
    with pytest.raises(Refused, match="31 modes for a model of 32"):
        plan_flops(SMALL, [Mode.FULL] * 31, 1, 1)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("num_layers", [1, 6, 32])
def test_passes_of_a_sweep(mode: Mode, num_layers: int) -> None:
    below = num_layers * (num_layers - 1) // 2
    expected = {
        Mode.FULL: Passes(),
        Mode.FREEZE_VISUAL: Passes(layers=below),
        Mode.FREEZE_TEXT: Passes(layers=below),
        Mode.NO_VISUAL_FFN: Passes(layers=below),
        Mode.NO_VISUAL_QUERIES: Passes(layers=below, ffn=num_layers),
        Mode.SKIP_ATTENTION: Passes(layers=below, ffn=num_layers),
        Mode.DROP_VISUAL: Passes(text_layers=below + num_layers),
        Mode.BYPASS_VISUAL: Passes(layers=below, text_layers=num_layers),
    }[mode]
    assert sweep_passes(num_layers, mode) == expected
    assert ablation_passes(num_layers, mode, num_layers - 1).layers == 0
