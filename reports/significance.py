"""Tests of paired differences, their correction for many comparisons, and the questions that a loss needs."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

LEVEL: Final = 0.05
POWER: Final = 0.8
# Standard errors that lie between no loss and a loss that is seen with this power at this two-sided level.
_REACH: Final = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)


def p_value(differences_S: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of a mean paired difference of 0.

    Differences of one magnitude, such as those of scores of 0 and 1, take the exact McNemar test (a sign test of those
    that are not 0); others take the paired t-test. Raises ValueError without differences.
    """
    if not len(differences_S):
        raise ValueError("a test needs at least one difference")
    sizes = np.abs(differences_S[differences_S != 0])
    if not len(sizes):
        return 1.0
    if np.allclose(sizes, sizes[0], rtol=1e-9, atol=0):
        fewer = min(np.sum(differences_S > 0), np.sum(differences_S < 0))
        return min(1.0, 2 * float(special.bdtr(fewer, len(sizes), 0.5)))
    n = len(differences_S)
    t = abs(differences_S.mean()) / (differences_S.std(ddof=1) / sqrt(n))
    return 2 * float(special.stdtr(n - 1, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm (1979), in the order given.

    Those at most 0.05 contain a false discovery in at most 5 % of campaigns, however the comparisons depend on each
    other.
    """
    p_C = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_C, kind="stable")
    adjusted = np.maximum.accumulate(p_C[order] * np.arange(len(p_C), 0, -1))
    return _in_place(adjusted, order)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Benjamini and Hochberg (1995), in the order given.

    Of those at most 0.05, at most 5 % are expected to be false discoveries.
    """
    p_C = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_C, kind="stable")
    scaled = p_C[order] * len(p_C) / np.arange(1, len(p_C) + 1)
    return _in_place(np.minimum.accumulate(scaled[::-1])[::-1], order)


def _in_place(adjusted_C: NDArray[np.float64], order: NDArray[np.intp]) -> list[float]:
    """Return adjusted p-values, which have this order, where their p-values were; none exceeds 1."""
    found_C = np.empty_like(adjusted_C)
    found_C[order] = np.minimum(adjusted_C, 1.0)
    return [float(value) for value in found_C]


class Corrected(NamedTuple):
    """A p-value after the corrections of Holm (`p_holm`) and of Benjamini and Hochberg (`q_bh`)."""

    p_holm: float
    q_bh: float


def corrected(p_values: Sequence[float], families: Sequence[Hashable]) -> list[Corrected]:
    """Return the corrected p-values in the order given; those of one family are corrected together."""
    members = defaultdict[Hashable, list[int]](list)
    for index, family in enumerate(families):
        members[family].append(index)
    found: dict[int, Corrected] = {}
    for indices in members.values():
        own = [p_values[index] for index in indices]
        found |= dict(zip(indices, map(Corrected, holm(own), benjamini_hochberg(own)), strict=True))
    return [found[index] for index in range(len(p_values))]


class Paired(NamedTuple):
    """What a comparison of `n` questions says about the variance of paired differences.

    `sd` is their standard deviation, `difference` their mean, and `discordant` the share that is not 0.
    """

    n: int
    difference: float
    sd: float
    discordant: float

    @property
    def _square(self) -> float:
        """The mean square of the differences."""
        return self.sd**2 * (self.n - 1) / self.n + self.difference**2

    @property
    def _step(self) -> float:
        """The size of a difference that is not 0; 1, as of scores of 0 and 1, where there is none."""
        return sqrt(self._square / self.discordant) if self.discordant else 1.0

    def questions_needed(self, loss: float) -> int:
        """Return how many questions show a mean loss with 80 % power in a paired, two-sided test at 5 %.

        As many scores differ as here, but no fewer than the loss itself needs: a loss of one point changes at least
        one question in a hundred. A normal approximation (Connor 1987, for scores of 0 and 1).
        """
        variance = max(self._square, self._step * loss) - loss**2
        return max(1, ceil(_REACH**2 * variance / loss**2))

    def smallest_loss(self) -> float:
        """Return the smallest mean loss that as many questions as here show, with the same power and test."""
        share = _REACH**2 / (self.n + _REACH**2)
        return sqrt(share * max(self._square, self._step**2 * share))
