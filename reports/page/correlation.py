"""Rank correlation of two rankings of the same layers, ties included."""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def spearman(first_L: Values, second_L: Values) -> float | None:
    """Return Spearman's rho, tied values sharing their mean rank; None where one side is all ties."""
    first, second = (ranks - ranks.mean() for ranks in (_mean_ranks(first_L), _mean_ranks(second_L)))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else None


def kendall(first_L: Values, second_L: Values) -> float | None:
    """Return Kendall's tau-b; None where one side is all ties."""
    signs = [np.sign(values[:, None] - values[None, :]) for values in (first_L, second_L)]
    scale = np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float((signs[0] * signs[1]).sum() / scale) if scale else None


def _mean_ranks(values_L: Values) -> Values:
    _, places, counts = np.unique(values_L, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Values = (last - (counts - 1) / 2)[places]
    return ranks
