"""Choosing layers by count, FLOPs ratio and largest LC, and the controls."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv.costs import flops_ratio
from shortv.errors import Refused
from shortv.plan import Mode, modes_of_layers
from shortv.sweep.planning import Control, Evidence, Request, choose_layers, default_count, replacement_order
from tests.architectures import architecture

ARCH = architecture(num_kv_heads=2)
EVIDENCE = Evidence(
    architecture=ARCH,
    mode=Mode.FREEZE_VISUAL,
    ranking=(4, 2, 0, 1, 3),
    mean_lc={4: 0.0, 2: 0.02, 0: 0.01, 1: 0.5, 3: 0.9},  # 2 and 0 are ties within the noise
    t=10.0,
    v=30.0,
)
DROP = dataclasses.replace(
    EVIDENCE, mode=Mode.DROP_VISUAL, ranking=(4, 3, 1, 2, 0), mean_lc={4: 0.0, 3: 0.1, 1: 0.2, 2: 0.3, 0: 2.0}
)


def chosen(evidence: Evidence, **request: Any) -> tuple[int, ...]:
    return choose_layers(evidence, Request(**request)).layers


def test_default_count_is_the_papers() -> None:
    assert [default_count(layers) for layers in (1, 2, 5, 8, 32, 40)] == [1, 1, 3, 5, 19, 24]


def test_by_count() -> None:
    assert chosen(EVIDENCE) == (4, 2, 0)
    assert chosen(EVIDENCE, layers=2) == (4, 2)
    assert chosen(DROP, layers=2) == (4, 3)
    for count in (0, 6, -1):
        with pytest.raises(Refused, match=f"{count} layers cannot be replaced in a model of 5; give 1 to 5"):
            chosen(EVIDENCE, layers=count)


@given(target=st.floats(0.3, 1.0), mode=st.sampled_from([Mode.FREEZE_VISUAL, Mode.NO_VISUAL_FFN, Mode.DROP_VISUAL]))
def test_by_flops_ratio_takes_the_fewest_layers(target: float, mode: Mode) -> None:
    evidence = dataclasses.replace(EVIDENCE, mode=mode)

    def ratio(layers: tuple[int, ...]) -> float:
        return flops_ratio(ARCH, modes_of_layers(mode, layers, 5), evidence.t, evidence.v)

    every = ratio((0, 1, 2, 3, 4))
    if every > target:
        with pytest.raises(Refused, match=f"all 5 layers give {every:.4f}"):
            chosen(evidence, flops_ratio=target)
        return
    layers = chosen(evidence, flops_ratio=target)
    assert ratio(layers) <= target
    assert len(layers) == 1 or ratio(layers[:-1]) > target or mode is Mode.DROP_VISUAL
    fewer = choose_layers(evidence, Request(layers=max(1, len(layers) - 1))).layers
    assert len(layers) == 1 or ratio(fewer) > target


def test_by_largest_lc() -> None:
    assert chosen(EVIDENCE, max_lc=0.5) == (4, 2, 0, 1)
    assert chosen(EVIDENCE, max_lc=0.015) == (4, 0)  # no chosen layer is above the limit, not even by a tie
    assert chosen(EVIDENCE, max_lc=0.0) == (4,)
    with pytest.raises(Refused, match="the lowest is 0 at layer 4"):
        chosen(EVIDENCE, max_lc=-1.0)


def test_by_largest_lc_of_an_exit() -> None:
    assert chosen(DROP, max_lc=0.2) == (4, 3, 2, 1)  # LC(drop-visual, 1) prices layers 1 to 4 together
    assert chosen(DROP, max_lc=0.15) == (4, 3)


@pytest.mark.parametrize("request_", [{"layers": 3}, {"flops_ratio": 0.7}, {"max_lc": 0.02}, {}])
def test_controls_get_the_same_count(request_: dict[str, Any]) -> None:
    count = len(chosen(EVIDENCE, **request_))
    assert chosen(EVIDENCE, control=Control.FIRST, **request_) == tuple(range(count))
    assert chosen(EVIDENCE, control=Control.LAST, **request_) == (4, 3, 2, 1, 0)[:count]
    drawn = chosen(EVIDENCE, control=Control.RANDOM, **request_)
    assert len(set(drawn)) == count


def test_random_controls_follow_their_seed_and_nest() -> None:
    orders = [replacement_order(range(32), Mode.FREEZE_VISUAL, control=Control.RANDOM, seed=seed) for seed in range(3)]
    assert len(set(orders)) == 3
    assert orders[0] == replacement_order(range(32), Mode.FREEZE_TEXT, control=Control.RANDOM, seed=0)
    # The paper's controls must be found again by every later version.
    few = Request(layers=2, control=Control.RANDOM, control_seed=7)
    more = dataclasses.replace(few, layers=4)
    assert choose_layers(EVIDENCE, more).layers[:2] == choose_layers(EVIDENCE, few).layers


def test_drop_visual_leaves_no_choice() -> None:
    assert chosen(DROP, layers=2, control=Control.LAST) == (4, 3)
    for control in (Control.FIRST, Control.RANDOM):
        with pytest.raises(Refused, match="drop-visual always takes the last layers"):
            chosen(DROP, layers=2, control=control)


def test_a_broken_ranking_is_refused() -> None:
    with pytest.raises(Refused, match="does not hold every layer once"):
        replacement_order((0, 0, 1), Mode.FREEZE_VISUAL)
