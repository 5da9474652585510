"""Units of work: a batch of samples times a contiguous range of layers, planned by cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from shortv.costs import ablation_passes
from shortv.plan import Mode

# Shares of a whole layer pass: an FFN alone, and a layer over the text tokens alone.
FFN_SHARE = 2 / 3
TEXT_SHARE = 1 / 4


class Unit(NamedTuple):
    """Ablations of the layers `first` to `stop` - 1 for one batch."""

    batch: int
    first: int
    stop: int

    @property
    def unit_id(self) -> str:
        """The unit's name, which sorts by batch and layer."""
        return f"b{self.batch:06d}-l{self.first:04d}-{self.stop:04d}"

    @property
    def layers(self) -> range:
        """The layers to ablate."""
        return range(self.first, self.stop)

    @classmethod
    def parse(cls, unit_id: str) -> Unit:
        """Rebuild a unit from its name; raises ValueError for another name."""
        batch, first, stop = unit_id.removeprefix("b").replace("-l", "-").split("-")
        return cls(int(batch), int(first), int(stop))


def plan_units(
    *,
    n_batches: int,
    num_layers: int,
    modes: Sequence[Mode],
    workers: int,
    finished: Mapping[int, Collection[int]],
    layers_per_unit: int | None = None,
) -> list[Unit]:
    """Cut what is left of a sweep into units so that every worker has work.

    With as many batches as workers or more, a unit holds all layers and its clean pass serves them all. With fewer,
    each batch is split into the number of units that ends the sweep soonest: each unit repeats the clean pass of L
    layers. Which samples form a batch never depends on the workers.

    Args:
        finished: the layers already measured of each batch.
        layers_per_unit: split each batch into ranges of this many layers instead.
    """
    ranges = [unit for batch in range(n_batches) for unit in _open(batch, num_layers, finished.get(batch, ()))]
    if layers_per_unit is not None:
        return [
            Unit(unit.batch, first, min(first + layers_per_unit, unit.stop))
            for unit in ranges
            for first in range(unit.first, unit.stop, layers_per_unit)
        ]
    if not ranges or len(ranges) >= workers:
        return ranges
    costs = layer_costs(num_layers, modes)
    enough = min(workers, sum(len(unit.layers) for unit in ranges))
    splits = ([part for unit in ranges for part in _split(unit, costs, pieces)] for pieces in range(1, num_layers + 1))
    return min((units for units in splits if len(units) >= enough), key=lambda units: _makespan(units, costs, workers))


def layer_costs(num_layers: int, modes: Sequence[Mode]) -> list[float]:
    """Cost of ablating each layer in all modes, in layer passes, on top of the clean pass."""
    costs = []
    for layer in range(num_layers):
        passes = [ablation_passes(num_layers, mode, layer) for mode in modes]
        costs.append(sum(one.layers + FFN_SHARE * one.ffn + TEXT_SHARE * one.text_layers for one in passes))
    return costs


def _open(batch: int, num_layers: int, finished: Collection[int]) -> list[Unit]:
    """The ranges of layers of a batch that are not finished."""
    left = [layer for layer in range(num_layers) if layer not in finished]
    starts = [layer for layer in left if layer - 1 not in left]
    stops = [layer + 1 for layer in left if layer + 1 not in left]
    return [Unit(batch, first, stop) for first, stop in zip(starts, stops, strict=True)]


def _makespan(units: Sequence[Unit], costs: Sequence[float], workers: int) -> float:
    """Time of a sweep whose units go, in order, to whichever worker is free first."""
    busy = [0.0] * workers
    for unit in units:
        index = busy.index(min(busy))
        busy[index] += len(costs) + sum(costs[unit.first : unit.stop])
    return max(busy)


def _split(unit: Unit, costs: Sequence[float], pieces: int) -> list[Unit]:
    """Split a unit into ranges of about equal cost, none of them empty."""
    pieces = min(pieces, len(unit.layers))
    spent = list(accumulate(costs[unit.first : unit.stop]))
    cuts = [unit.first]
    for piece in range(1, pieces):
        reached = unit.first + bisect_left(spent, spent[-1] * piece / pieces)
        cuts.append(min(max(reached, cuts[-1]) + 1, unit.stop - (pieces - piece)))
    return [Unit(unit.batch, first, stop) for first, stop in pairwise([*cuts, unit.stop])]
