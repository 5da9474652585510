"""From per-sample divergences to a ranking of layers, with bootstrap intervals.

Matrices are [S samples, L layers], in nats. A bootstrap resample picks rows by number, so their order matters:
`kl_matrix` sorts them by sample id, and a sweep's numbers do not depend on which worker finished first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortv.errors import ShortVError
from shortv.plan import Mode
from shortv.records import KlDirection, LayerRecord

RESAMPLES = 1000
SHARES = (0.25, 0.5, 1.0)
# Half of the 5 % outside the interval on each side, in percent.
INTERVAL = (2.5, 97.5)
# Resamples drawn at a time; bounds the memory to this many float64 weights per sample.
_CHUNK = 100

Matrix = NDArray[np.float64]


def kl_matrix(
    sample_ids: Sequence[str] | NDArray[Any],
    layers: Sequence[int] | NDArray[Any],
    values: Sequence[float] | NDArray[Any],
    num_layers: int,
) -> Matrix:
    """Arrange measurements, one per sample and layer in any order, as [S, L] with rows sorted by sample id.

    Raises ShortVError when a measurement is missing or repeated, or names a layer outside the model.
    """
    ids, row = np.unique(np.asarray(sample_ids, dtype=object).astype(str), return_inverse=True)
    column = np.asarray(layers, dtype=np.int64)
    if column.size and (column.min() < 0 or column.max() >= num_layers):
        raise ShortVError(
            f"measurements name layers {column.min()} to {column.max()}, the model has {num_layers}; "
            "run the sweep again in a new folder"
        )
    found_SL = np.zeros((ids.size, num_layers), dtype=np.int64)
    np.add.at(found_SL, (row, column), 1)
    wrong = np.argwhere(found_SL != 1)
    if wrong.size:
        sample, layer = wrong[0]
        raise ShortVError(
            f"sample {str(ids[sample])!r} has {found_SL[sample, layer]} measurements of layer {layer}, "
            "where one is needed; run the sweep again in a new folder"
        )
    kl_SL = np.zeros((ids.size, num_layers))
    kl_SL[row, column] = np.asarray(values, dtype=np.float64)
    return kl_SL


def rank_layers(kl_SL: Matrix, noise_floor: float) -> tuple[int, ...]:
    """Return all layers by ascending mean LC, the first to replace first (ShortV section 3.1).

    Layers closer together than the noise floor, in nats, are ties, and the deepest of them ranks first. A group of
    ties starts at its lowest mean and holds every layer within the noise floor of that mean, so a chain of close
    means does not become one group. Equal means always tie.
    """
    _check(kl_SL)
    return _order(kl_SL.mean(axis=0), noise_floor)


def layer_statistics(
    kl_SL: Matrix,
    *,
    mode: Mode,
    kl_direction: KlDirection,
    noise_floor: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> list[LayerRecord]:
    """Return mean LC and rank of every layer with 95 % percentile intervals, in the order of the layers.

    Both intervals come from the same bootstrap over samples; with a single sample they are points.
    Raises ShortVError without any sample and for divergences that are not finite.
    """
    _check(kl_SL)
    mean_L = kl_SL.mean(axis=0)
    rank_L = _ranks(mean_L, noise_floor)
    mean_RL, rank_RL = _bootstrap(kl_SL, len(kl_SL), noise_floor, np.random.default_rng(seed), resamples)
    ci_low_L, ci_high_L = np.percentile(mean_RL, INTERVAL, axis=0)
    # Ranks are whole numbers, so a bound between two of them moves outwards.
    rank_low_L = np.percentile(rank_RL, INTERVAL[0], axis=0, method="lower")
    rank_high_L = np.percentile(rank_RL, INTERVAL[1], axis=0, method="higher")
    return [
        LayerRecord(
            mode=mode,
            layer=layer,
            n=len(kl_SL),
            kl_direction=kl_direction,
            mean=float(mean_L[layer]),
            ci_low=float(ci_low_L[layer]),
            ci_high=float(ci_high_L[layer]),
            rank=int(rank_L[layer]),
            rank_low=int(rank_low_L[layer]),
            rank_high=int(rank_high_L[layer]),
        )
        for layer in range(kl_SL.shape[1])
    ]


def set_stability(
    kl_SL: Matrix, n_layers: int, *, noise_floor: float, seed: int, resamples: int = RESAMPLES
) -> dict[float, float]:
    """Return how often a bootstrap resample chooses the same `n_layers` layers as all samples do.

    Keys are shares of the samples that a resample draws (at least one), values are shares of the resamples. Layers
    are compared as sets: their order does not matter.
    """
    _check(kl_SL)
    chosen_L = _ranks(kl_SL.mean(axis=0), noise_floor) <= n_layers
    stability = {}
    for share in SHARES:
        draws = max(1, round(share * len(kl_SL)))
        _, rank_RL = _bootstrap(kl_SL, draws, noise_floor, np.random.default_rng(seed), resamples)
        stability[share] = float(((rank_RL <= n_layers) == chosen_L).all(axis=1).mean())
    return stability


def _check(kl_SL: Matrix) -> None:
    if kl_SL.ndim != 2 or kl_SL.shape[1] == 0:
        raise ShortVError(f"divergences have the shape {kl_SL.shape}; samples by layers are needed")
    if len(kl_SL) == 0:
        raise ShortVError("no sample counts for this mode; add samples (with images for a visual mode)")
    if not np.isfinite(kl_SL).all():
        sample, layer = np.argwhere(~np.isfinite(kl_SL))[0]
        raise ShortVError(
            f"the divergence of sample {sample} at layer {layer} is {kl_SL[sample, layer]}, "
            "which is not finite; leave that sample out or measure in float32"
        )


def _order(mean_L: NDArray[Any], noise_floor: float) -> tuple[int, ...]:
    means = mean_L.tolist()
    order: list[int] = []
    group: list[int] = []
    for layer in sorted(range(len(means)), key=lambda layer: (means[layer], -layer)):
        if group and means[layer] != means[group[0]] and means[layer] - means[group[0]] >= noise_floor:
            order += sorted(group, reverse=True)
            group = []
        group.append(layer)
    return (*order, *sorted(group, reverse=True))


def _ranks(mean_L: NDArray[Any], noise_floor: float) -> NDArray[np.int64]:
    rank_L = np.empty(len(mean_L), dtype=np.int64)
    rank_L[list(_order(mean_L, noise_floor))] = np.arange(1, len(mean_L) + 1)
    return rank_L


def _bootstrap(
    kl_SL: Matrix, draws: int, noise_floor: float, rng: np.random.Generator, resamples: int
) -> tuple[Matrix, NDArray[np.int64]]:
    """Return mean LC [R, L] in nats and rank of every layer [R, L], counted from 1, of all resamples."""
    means = []
    for start in range(0, resamples, _CHUNK):
        picks = (rng.integers(len(kl_SL), size=draws) for _ in range(min(_CHUNK, resamples - start)))
        # How often each resample draws each sample.
        weight_RS = np.stack([np.bincount(pick, minlength=len(kl_SL)) for pick in picks]).astype(np.float64)
        means.append(weight_RS @ kl_SL / draws)
    mean_RL = np.concatenate(means)
    return mean_RL, np.stack([_ranks(mean_L, noise_floor) for mean_L in mean_RL])
