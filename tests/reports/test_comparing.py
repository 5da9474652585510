"""Paired comparison: means, intervals and shares over the samples that all sides have."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.comparing import Side, bootstrap_interval, compare, hard_docs


def side(values: dict[int, float], answers: dict[int, int] | None = None) -> Side:
    return Side(
        docs=np.array(list(values), dtype=np.int32),
        values=np.array(list(values.values()), dtype=np.float64),
        answers=np.array([(answers or {}).get(doc, 0) for doc in values], dtype=np.int64),
    )


def test_only_samples_with_a_score_on_both_sides_count() -> None:
    plan = side({7: 1, 1: 0, 4: 1, 5: 1, 9: float("nan")}, {7: 5})
    full = side({1: 1, 4: 1, 7: 1, 9: 1, 6: 0})
    found = compare(plan, [full])
    assert found is not None
    assert (found.n, found.value, found.against_value) == (3, pytest.approx(2 / 3), 1.0)
    assert found.difference == pytest.approx(-1 / 3) and found.share_changed == pytest.approx(1 / 3)
    assert found.ci_low == -1 and found.ci_high == 0
    assert found.p_value == 1 and found.discordant == pytest.approx(1 / 3) and found.sd == pytest.approx(3**-0.5)
    assert compare(plan, [side({8: 1})]) is None and compare(side({}), [full]) is None


def test_against_the_mean_of_several() -> None:
    plan = side({0: 1, 1: 1}, {0: 1})
    controls = [side({0: 1, 1: 0}, {0: 1}), side({1: 0, 0: 0}), side({0: 1, 1: 1, 2: 0}, {0: 1})]
    found = compare(plan, controls)
    assert found is not None and found.n == 2
    assert found.against_value == pytest.approx(0.5) and found.difference == pytest.approx(0.5)
    assert found.share_changed == pytest.approx((0 + 0.5 + 0) / 3)


def test_the_hard_subset_holds_what_the_control_gets_wrong() -> None:
    control = side({0: 1, 3: 0, 2: 0.5, 4: float("nan"), 6: 0})
    hard = hard_docs(control, best=1.0)
    assert sorted(hard) == [2, 3, 6]
    plan, full = side({0: 1, 2: 0, 3: 1, 4: 1}), side({0: 0, 2: 0, 3: 0, 4: 0})
    found = compare(plan, [full], among=hard)
    assert found is not None and (found.n, found.difference) == (2, 0.5)
    assert compare(plan, [full], among=hard_docs(control, best=0.0)) is None


@given(st.permutations(range(30)), st.integers(0, 3))
def test_the_order_of_samples_does_not_matter(order: list[int], seed: int) -> None:
    values = np.random.default_rng(1).normal(size=30)
    full = side(dict.fromkeys(range(30), 0.0))
    plan = side(dict(enumerate(values)))
    shuffled = side({index: values[index] for index in order})
    assert compare(plan, [full], seed=seed, resamples=50) == compare(shuffled, [full], seed=seed, resamples=50)


@pytest.mark.parametrize("few", [True, False])
def test_intervals_agree_with_the_normal_ones(few: bool) -> None:
    """Both ways to resample give the interval that theory gives for a mean of many."""
    random = np.random.default_rng(0)
    values = random.choice([-1.0, 0.0, 1.0], size=4000, p=[0.1, 0.7, 0.2]) if few else random.normal(size=4000)
    low, high = bootstrap_interval(values, seed=3)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    samples = random.choice([-1.0, 0.0, 1.0], size=(400, 200), p=[0.1, 0.7, 0.2])
    intervals = [bootstrap_interval(values, seed=index, resamples=500) for index, values in enumerate(samples)]
    covered = np.mean([low <= 0.1 <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.98


def test_one_sample_and_none() -> None:
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(np.array([]))


def test_many_samples_take_little_memory() -> None:
    values = np.random.default_rng(0).normal(size=30_000)
    tracemalloc.start()
    try:
        low, high = bootstrap_interval(values, resamples=2000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(30_000), rel=0.1)
    assert peak < 250 * 2**20
