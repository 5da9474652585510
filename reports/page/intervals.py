"""95 % intervals of metrics, which never leave a metric's range."""

from collections.abc import Iterable, Mapping
from math import hypot, isfinite, sqrt
from typing import Any, Final, NamedTuple

_NORMAL_95: Final = 1.96
# Standard errors that agree to so many digits are the same.
_NEAR: Final = 1e-6
WILSON: Final = "Wilson"
CLIPPED: Final = "standard error, within 0 to 1"
NORMAL: Final = "standard error"
_SAID: Final = {
    WILSON: "Wilson's for scores of 0 and 1",
    CLIPPED: "by the standard error, cut to the range 0 to 1",
    NORMAL: "by the standard error",
}


class Interval(NamedTuple):
    """A 95 % interval, and by which method it was found."""

    low: float
    high: float
    method: str


def interval_of(row: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a row of the table of metrics; None where it has no standard error.

    Among n values in 0..1 of mean p none have a larger standard error than zeros and ones, sqrt(p (1 - p) / (n - 1)).
    So the row itself tells whether its scores lie in that range, where the interval is cut, and whether all of them are
    0 or 1, where it is Wilson's (1927); clustered samples are fewer than n, and keep their standard error.
    """
    clustered, plain, by_limit = (_known(row[name]) for name in ("stderr_clustered", "stderr", "stderr_clt"))
    value, own = _known(row["value"]), by_limit if by_limit is not None else plain
    error = next((found for found in (clustered, plain, by_limit) if found is not None), None)
    if value is None or error is None:
        return None
    most = sqrt(value * (1 - value) / (row["n"] - 1)) if 0 <= value <= 1 and row["n"] > 1 else None
    low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    if own is None or most is None or own > most + _NEAR:
        return Interval(low, high, NORMAL)
    if clustered is None and own > most - _NEAR:
        return _wilson(value, row["n"])
    return Interval(max(low, 0.0), min(high, 1.0), CLIPPED)


def interval_note(methods: Iterable[str]) -> str:
    """Return what a chart says of bars whose intervals were found by these methods."""
    found = [said for method, said in _SAID.items() if method in set(methods)]
    return f"Bars: 95 % intervals, {' or '.join(found)}." if found else "No interval is known."


def interval_of_difference(value: float, own: Interval, against: float, other: Interval) -> tuple[float, float]:
    """Return the ends of the interval of `value - against`, as of two independent runs (Newcombe 1998, method 10)."""
    difference = value - against
    low, high = hypot(value - own.low, other.high - against), hypot(own.high - value, against - other.low)
    return difference - low, difference + high


def _wilson(share: float, n: int) -> Interval:
    weight = _NORMAL_95**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0), WILSON)


def _known(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else float(value)
