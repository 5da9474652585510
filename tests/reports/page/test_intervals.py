"""95 % intervals of metrics."""

from math import nan, sqrt
from typing import Any

import pytest

from reports.page.campaign_data import (
    CLIPPED,
    NORMAL,
    WILSON,
    difference_of,
    interval_note,
    interval_of,
    with_interval,
)


def row(value: float | None, stderr: float | None, n: int = 100, **changes: Any) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "stderr_clt": stderr, "stderr_clustered": None, "n": n} | changes


def of_zeros_and_ones(ones: int, n: int) -> dict[str, Any]:
    share = ones / n
    return row(share, sqrt(share * (1 - share) / (n - 1)), n)


@pytest.mark.parametrize(
    ("ones", "n", "low", "high"),
    # By the formula of Wilson 1927; the first is the textbook's 81 of 263.
    [(81, 263, 0.2553, 0.3662), (166, 166, 0.9774, 1.0), (0, 166, 0.0, 0.0226), (998, 1000, 0.9927, 0.9995)],
)
def test_scores_of_zero_and_one_have_wilsons_interval(ones: int, n: int, low: float, high: float) -> None:
    found = interval_of(of_zeros_and_ones(ones, n))
    assert found == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), WILSON)


@pytest.mark.parametrize(
    ("scores", "low", "high", "method"),
    [
        (row(0.99, 0.008), 0.99 - 1.96 * 0.008, 1.0, CLIPPED),
        (row(0.01, 0.008), 0.0, 0.01 + 1.96 * 0.008, CLIPPED),
        # Clustered samples keep their own standard error.
        (of_zeros_and_ones(90, 100) | {"stderr_clustered": 0.07}, 0.9 - 1.96 * 0.07, 1.0, CLIPPED),
        # Metrics of another range are not cut.
        (row(0.9, 0.5), -0.08, 1.88, NORMAL),
        (row(1500.0, 0.5), 1499.02, 1500.98, NORMAL),
        (row(-2.0, 0.5), -2.98, -1.02, NORMAL),
    ],
)
def test_other_scores_have_the_interval_of_their_standard_error(
    scores: dict[str, Any], low: float, high: float, method: str
) -> None:
    assert interval_of(scores) == (pytest.approx(low), pytest.approx(high), method)
    assert {"low": None, "high": None}.items() <= with_interval(scores | row(0.5, nan)).items()


def test_charts_say_which() -> None:
    assert interval_note([WILSON, WILSON]) == "Bars: 95 % intervals, Wilson's for scores of 0 and 1."
    assert "Wilson's for scores of 0 and 1 or by the standard error." in interval_note([NORMAL, WILSON])
    assert "cut to the range 0 to 1" in interval_note([CLIPPED]) and interval_note([None]) == "No interval is known."


def test_differences_of_two_runs() -> None:
    # Newcombe 1998, table II, example (a), method 10: 56 of 70 against 48 of 80.
    own, other = (with_interval(of_zeros_and_ones(*counts)) for counts in ((56, 70), (48, 80)))
    found = difference_of(own, other)
    assert (found["low"], found["high"]) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_of(own, with_interval(row(0.8, None))) == {"difference": 0.0, "low": None, "high": None}
