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


@pytest.mark.parametrize(
    ("evidence", "request_", "layers"),
    [
        (EVIDENCE, {}, (4, 2, 0)),
        (EVIDENCE, {"layers": 2}, (4, 2)),
        (DROP, {"layers": 2}, (4, 3)),
        (EVIDENCE, {"max_lc": 0.5}, (4, 2, 0, 1)),
        (EVIDENCE, {"max_lc": 0.015}, (4, 0)),  # no chosen layer is above the limit, not even by a tie
        (EVIDENCE, {"max_lc": 0.0}, (4,)),
        (DROP, {"max_lc": 0.2}, (4, 3, 2, 1)),  # LC(drop-visual, 1) prices layers 1 to 4 together
        (DROP, {"max_lc": 0.15}, (4, 3)),
        (DROP, {"layers": 2, "control": Control.LAST}, (4, 3)),
    ],
)
def test_layers_are_chosen_by_count_and_by_largest_lc(
    evidence: Evidence, request_: dict[str, Any], layers: tuple[int, ...]
) -> None:
    assert chosen(evidence, **request_) == layers


@pytest.mark.parametrize(
    ("evidence", "request_", "reason"),
    [
        *((EVIDENCE, {"layers": count}, f"{count} layers cannot be replaced in a model of 5") for count in (0, 6, -1)),
        (EVIDENCE, {"max_lc": -1.0}, "the lowest is 0 at layer 4"),
        (DROP, {"layers": 2, "control": Control.FIRST}, "always takes the last layers"),
        (DROP, {"layers": 2, "control": Control.RANDOM}, "always takes the last layers"),
        (dataclasses.replace(EVIDENCE, ranking=(0, 0, 1)), {}, "does not hold every layer once"),
    ],
)
def test_what_cannot_be_chosen_is_refused(evidence: Evidence, request_: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        chosen(evidence, **request_)


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
    assert len(layers) == 1 or ratio(chosen(evidence, layers=len(layers) - 1)) > target


@pytest.mark.parametrize("request_", [{"layers": 3}, {"flops_ratio": 0.7}, {"max_lc": 0.02}, {}])
def test_controls_get_the_same_count(request_: dict[str, Any]) -> None:
    count = len(chosen(EVIDENCE, **request_))
    assert chosen(EVIDENCE, control=Control.FIRST, **request_) == tuple(range(count))
    assert chosen(EVIDENCE, control=Control.LAST, **request_) == (4, 3, 2, 1, 0)[:count]
    assert len(set(chosen(EVIDENCE, control=Control.RANDOM, **request_))) == count


def test_random_controls_follow_their_seed_and_nest() -> None:
    orders = [replacement_order(range(32), Mode.FREEZE_VISUAL, control=Control.RANDOM, seed=seed) for seed in range(3)]
    assert len(set(orders)) == 3
    assert orders[0] == replacement_order(range(32), Mode.FREEZE_TEXT, control=Control.RANDOM, seed=0)
    few, more = (chosen(EVIDENCE, layers=count, control=Control.RANDOM, control_seed=7) for count in (2, 4))
    assert more[:2] == few
