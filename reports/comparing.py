"""Paired comparison of per-sample scores: one plan against another, or against the mean of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reports.significance import p_value

RESAMPLES: Final = 4_000
# With fewer distinct values, drawing a count for each of them is a cheaper form of the same resampling.
_FEW_DISTINCT: Final = 256
_ROUND_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The scores of one plan on one task by one metric.

    `docs` are distinct positions of documents in the task, `values` are NaN for documents without a score, and
    `answers` are numbers that are equal for equal answers. All three have the same order.
    """

    docs: NDArray[np.int32]
    values: NDArray[np.float64]
    answers: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One plan compared with another on the `n` samples that both have.

    `value` and `against_value` are means of per-sample scores, `difference` is the first less the second, with its
    95 % interval and two-sided paired `p_value`. `sd` is the standard deviation of the paired differences (None for a
    single sample), `discordant` the share of samples whose scores differ. `share_changed` is the share of answers that
    differ as text.
    """

    n: int
    value: float
    against_value: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    sd: float | None
    discordant: float
    share_changed: float


def compare(
    plan: Side,
    against: Sequence[Side],
    *,
    among: NDArray[np.int32] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison | None:
    """Compare a plan with another one, or with the mean of several, on the samples that all of them have.

    Against several, a sample's score is their mean score, and `share_changed` the mean of their shares.
    The order of the samples does not matter. Returns None when no sample has a score on every side.

    Args:
        among: distinct positions of the documents that count; None for all.
        seed: of the resamples that the interval is made from.
        resamples: their number.
    """
    sides = (plan, *against)
    scored = [side.docs[~np.isnan(side.values)] for side in sides] + ([] if among is None else [among])
    common_S = reduce(lambda first, second: np.intersect1d(first, second, assume_unique=True), scored)
    if not len(common_S):
        return None
    places = [_places(side.docs, common_S) for side in sides]
    values, *others = (side.values[at] for side, at in zip(sides, places, strict=True))
    answers, *changed = (side.answers[at] for side, at in zip(sides, places, strict=True))
    mean_S = np.mean(others, axis=0)
    differences_S = values - mean_S
    low, high = bootstrap_interval(differences_S, seed=seed, resamples=resamples)
    return Comparison(
        n=len(common_S),
        value=float(values.mean()),
        against_value=float(mean_S.mean()),
        difference=float(differences_S.mean()),
        ci_low=low,
        ci_high=high,
        p_value=p_value(differences_S),
        sd=float(differences_S.std(ddof=1)) if len(common_S) > 1 else None,
        discordant=float(np.mean(differences_S != 0)),
        share_changed=float(np.mean([np.mean(answers != other) for other in changed])),
    )


def hard_docs(control: Side, best: float) -> NDArray[np.int32]:
    """Return the documents that a control with less of the image does not get right: those scored below the best value.

    The hard subset of VTC-Bench (arXiv 2510.07143): questions that need what the smaller image lost.
    """
    # NaN, a document without a score, is not below anything.
    return control.docs[control.values < best]


def bootstrap_interval(
    values_S: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES, coverage: float = 0.95
) -> tuple[float, float]:
    """Return both ends of the percentile bootstrap interval of the mean; for paired data, give the differences.

    The same values in the same order and the same seed give the same interval. Raises ValueError without values.
    """
    if not len(values_S):
        raise ValueError("an interval needs at least one value")
    random = np.random.default_rng(seed)
    distinct, counts = np.unique(values_S, return_counts=True)
    if len(distinct) <= _FEW_DISTINCT:
        drawn = random.multinomial(len(values_S), counts / len(values_S), size=resamples)
        means = drawn @ distinct / len(values_S)
    else:
        means = _resampled_means(values_S, random, resamples)
    edge = 50 * (1 - coverage)
    low, high = np.percentile(means, [edge, 100 - edge])
    return float(low), float(high)


def _resampled_means(values_S: NDArray[np.float64], random: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Return the means of resamples, drawn in rounds of bounded memory."""
    size = len(values_S)
    per_round = max(1, _ROUND_BYTES // (size * 16))
    rounds = [min(per_round, resamples - start) for start in range(0, resamples, per_round)]
    return np.concatenate([values_S[random.integers(size, size=(count, size))].mean(axis=1) for count in rounds])


def _places(docs: NDArray[np.int32], wanted: NDArray[np.int32]) -> NDArray[np.intp]:
    order = np.argsort(docs)
    return order[np.searchsorted(docs, wanted, sorter=order)]
