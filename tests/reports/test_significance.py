"""Tests of paired differences against scipy's, corrections against their definitions, and sizes against simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reports.significance import Paired, benjamini_hochberg, corrected, holm, p_value

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_scores_of_0_and_1_take_the_exact_mcnemar_test() -> None:
    differences = np.array([1.0] * 4 + [-1.0] * 15 + [0.0] * 81)
    assert p_value(differences) == pytest.approx(stats.binomtest(4, 19).pvalue)
    # One magnitude, with the rounding of floating-point numbers.
    assert p_value(np.array([0.3 - 0.1, 0.1 - 0.3, 0.5 - 0.7])) == 1.0
    assert p_value(np.zeros(5)) == p_value(np.array([0.25])) == p_value(np.array([1.0, -1.0])) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        p_value(np.array([]))


@given(st.lists(st.integers(-4, 4), min_size=3, max_size=40).filter(lambda found: len(set(map(abs, found)) - {0}) > 1))
def test_other_scores_take_the_paired_t_test(differences: list[int]) -> None:
    values = np.array(differences) / 4
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


@given(P_VALUES)
def test_holm_rejects_as_its_steps_do(p_values: list[float]) -> None:
    """A hypothesis is rejected at a level until the first, in order, whose p-value is above its share of the level."""
    adjusted = holm(p_values)
    for level in (*adjusted, 0.05):
        rejected, left = set[int](), len(p_values)
        for index in sorted(range(len(p_values)), key=lambda one: p_values[one]):
            if p_values[index] * left > level:
                break
            rejected.add(index)
            left -= 1
        assert rejected == {index for index, found in enumerate(adjusted) if found <= level} or level >= 1


@given(P_VALUES)
def test_benjamini_hochberg_agrees_with_scipy(p_values: list[float]) -> None:
    assert benjamini_hochberg(p_values) == pytest.approx(stats.false_discovery_control(p_values))
    assert np.all(np.array(benjamini_hochberg(p_values)) <= np.array(holm(p_values)) * (1 + 1e-12))


def test_families_are_corrected_apart() -> None:
    p_values, families = [0.01, 0.04, 0.03, 0.2], ["a", "b", "a", "a"]
    found = corrected(p_values, families)
    assert [one.p_holm for one in found] == pytest.approx([0.03, 0.04, 0.06, 0.2])
    assert [one.q_bh for one in found] == pytest.approx([0.03, 0.04, 0.045, 0.2])
    assert corrected([], []) == holm([]) == benjamini_hochberg([]) == []


def share_seen(n: int, loss: float, discordant: float, repeats: int = 2000) -> float:
    """Return how often losses of this mean are significant, where this share of scores of 0 and 1 differs."""
    random = np.random.default_rng(0)
    shares = [(discordant + loss) / 2, 1 - discordant, (discordant - loss) / 2]
    drawn = random.choice([-1.0, 0.0, 1.0], p=shares, size=(repeats, n))
    return float(np.mean([p_value(values) <= 0.05 for values in drawn]))


@pytest.mark.parametrize(("discordant", "loss"), [(0.2, 0.05), (0.1, 0.03), (0.02, 0.02), (0.0, 0.01)])
def test_as_many_questions_as_needed_show_the_loss(discordant: float, loss: float) -> None:
    """The exact test is a little more careful than the normal approximation that the number comes from."""
    known = Paired(n=2000, difference=0.0, sd=discordant**0.5, discordant=discordant)
    needed = known.questions_needed(loss)
    assert 0.7 <= share_seen(needed, loss, max(discordant, loss)) <= 0.9
    assert known._replace(n=needed).smallest_loss() == pytest.approx(loss, rel=0.01)


def test_scores_between_0_and_1_need_fewer_questions() -> None:
    values = np.random.default_rng(1).normal(0, 0.3, size=400)
    known = Paired(n=400, difference=values.mean(), sd=values.std(ddof=1), discordant=1.0)
    assert known.questions_needed(0.05) == pytest.approx((2.8016 * 0.3 / 0.05) ** 2, rel=0.2)
    assert known.questions_needed(0.01) > 20 * known.questions_needed(0.05)
