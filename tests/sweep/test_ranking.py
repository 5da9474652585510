"""Ranking, its ties, and how sure the bootstrap says it is."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv.errors import ShortVError
from shortv.plan import Mode
from shortv.records import KlDirection, LayerRecord
from shortv.sweep.ranking import Matrix, kl_matrix, layer_statistics, rank_layers, set_stability


def statistics(kl_SL: Matrix, **changes: Any) -> list[LayerRecord]:
    arguments: dict[str, Any] = {
        "mode": Mode.FREEZE_VISUAL,
        "kl_direction": KlDirection.FULL_ABLATED,
        "noise_floor": 0.0,
        "seed": 0,
        "resamples": 200,
    }
    return layer_statistics(kl_SL, **arguments | changes)


def noisy(means: list[float], samples: int, spread: float) -> Matrix:
    rng = np.random.default_rng(1)
    return np.array(means) + spread * rng.standard_normal((samples, len(means)))


@pytest.mark.parametrize(
    ("means", "noise_floor", "order"),
    [
        ([3.0, 1.0, 2.0, 0.0], 0.0, (3, 1, 2, 0)),
        ([1.0, 1.0, 1.0], 0.0, (2, 1, 0)),
        ([1.00, 1.05, 5.0], 0.1, (1, 0, 2)),
        ([1.0, 1.5, 5.0], 0.5, (0, 1, 2)),  # as far apart as the noise floor: no tie
        ([0.0, 0.3, 0.6, 0.9], 0.5, (1, 0, 3, 2)),  # a chain does not become one group
        ([0.9, 0.6, 0.3, 0.0], 0.5, (3, 2, 1, 0)),
    ],
)
def test_layers_closer_than_the_noise_are_ties(means: list[float], noise_floor: float, order: tuple[int, ...]) -> None:
    assert rank_layers(np.array([means, means]), noise_floor) == order


@given(
    means=st.lists(st.floats(0, 10).map(lambda value: round(value, 1)), min_size=1, max_size=12),
    noise_floor=st.sampled_from([0.0, 0.1, 0.5, 100.0]),
)
def test_ranking_is_a_total_order_that_ascends_up_to_noise(means: list[float], noise_floor: float) -> None:
    order = rank_layers(np.array([means]), noise_floor)
    assert sorted(order) == list(range(len(means)))
    for before, after in pairwise(order):
        assert means[before] <= means[after] + noise_floor + 1e-12
        if means[before] == means[after]:
            assert before > after


def test_ranks_intervals_and_order_agree() -> None:
    kl_SL = noisy([0.5, 0.0, 0.2, 0.21, 0.9], samples=60, spread=0.05)
    records = statistics(kl_SL)
    assert statistics(kl_SL) == records != statistics(kl_SL, seed=2)
    assert [record.layer for record in records] == [0, 1, 2, 3, 4]
    ranked = sorted(records, key=lambda record: record.rank)
    assert tuple(record.layer for record in ranked) == rank_layers(kl_SL, 0.0)
    assert [record.rank for record in ranked] == [1, 2, 3, 4, 5]
    for record in records:
        assert record.n == 60
        assert record.ci_low < record.mean < record.ci_high
        assert record.rank_low <= record.rank <= record.rank_high
    assert {(record.rank_low, record.rank_high) for record in records if record.layer in (2, 3)} == {(2, 3)}
    assert (records[4].rank_low, records[4].rank_high) == (5, 5)


def test_the_interval_is_that_of_the_mean() -> None:
    """For many samples the percentile bootstrap comes close to the normal interval of a mean."""
    kl_SL = noisy([1.0], samples=2000, spread=0.3)
    (record,) = statistics(kl_SL, resamples=1000)
    half = 1.96 * kl_SL.std() / 2000**0.5
    assert (record.ci_low, record.ci_high) == pytest.approx((record.mean - half, record.mean + half), abs=0.15 * half)


def test_one_sample_has_point_intervals() -> None:
    for record in statistics(np.array([[0.3, 0.1, 0.2]])):
        assert record.ci_low == record.mean == record.ci_high
        assert record.rank_low == record.rank == record.rank_high
    assert set_stability(np.array([[0.3, 0.1]]), 1, noise_floor=0.0, seed=0) == {0.25: 1.0, 0.5: 1.0, 1.0: 1.0}


def test_sets_are_stable_where_the_gap_is_wide() -> None:
    kl_SL = noisy([0.0, 0.01, 0.5, 0.51], samples=40, spread=0.1)
    arguments: dict[str, Any] = {"noise_floor": 0.0, "seed": 0, "resamples": 200}
    assert set_stability(kl_SL, 2, **arguments) == {0.25: 1.0, 0.5: 1.0, 1.0: 1.0}
    narrow = set_stability(kl_SL, 1, **arguments)
    assert narrow[0.25] < 1
    assert set_stability(kl_SL, 4, **arguments)[0.25] == 1.0
    assert set_stability(kl_SL, 1, **arguments | {"noise_floor": 10.0})[0.25] == 1.0


def test_without_samples_or_numbers_there_is_no_ranking() -> None:
    with pytest.raises(ShortVError, match="no sample counts"):
        rank_layers(np.empty((0, 3)), 0.0)
    with pytest.raises(ShortVError, match="sample 1 at layer 0 is nan"):
        statistics(np.array([[0.0], [np.nan]]))
    with pytest.raises(ShortVError, match="samples by layers"):
        rank_layers(np.empty(3), 0.0)


@given(order=st.permutations(range(6)))
def test_a_matrix_does_not_depend_on_the_order_of_measurements(order: list[int]) -> None:
    ids, layers, values = ["b", "b", "a", "a", "c", "c"], [0, 1, 0, 1, 0, 1], [2.0, 2.1, 1.0, 1.1, 3.0, 3.1]
    shuffled = [[column[i] for i in order] for column in (ids, layers, values)]
    kl_SL = kl_matrix(shuffled[0], shuffled[1], shuffled[2], 2)  # type: ignore[arg-type]
    assert kl_SL.tolist() == [[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]]


def test_a_matrix_with_holes_is_refused() -> None:
    with pytest.raises(ShortVError, match="'a' has 0 measurements of layer 1"):
        kl_matrix(["a", "b", "b"], [0, 0, 1], [1.0, 1.0, 1.0], 2)
    with pytest.raises(ShortVError, match="'a' has 2 measurements of layer 0"):
        kl_matrix(["a", "a"], [0, 0], [1.0, 1.0], 1)
    with pytest.raises(ShortVError, match="layers 0 to 2, the model has 2"):
        kl_matrix(["a", "a", "a"], [0, 1, 2], [1.0, 1.0, 1.0], 2)
    assert kl_matrix([], [], [], 2).shape == (0, 2)
