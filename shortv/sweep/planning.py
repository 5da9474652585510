"""Which layers a plan replaces: an order of layers, and how many of them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shortv.architecture import Architecture
from shortv.costs import flops_ratio
from shortv.errors import Refused
from shortv.plan import Mode, modes_of_layers


class Control(StrEnum):
    """An order of layers that does not depend on their LC: the control of a plan (ShortV table 6)."""

    RANDOM = "random"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a sweep measured for one mode.

    `ranking` holds every layer by ascending LC and `mean_lc` their means in nats. `t` and `v` are the mean numbers of
    text and visual tokens of the samples that count for the mode.
    """

    architecture: Architecture
    mode: Mode
    ranking: tuple[int, ...]
    mean_lc: Mapping[int, float]
    t: float
    v: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How many layers to replace, and in which order.

    At most one of `layers` (a count), `flops_ratio` (the largest share of the full model's FLOPs) and `max_lc` (the
    largest LC, in nats) is given; without any it is `default_count`. Without a control the order is by LC.
    """

    layers: int | None = None
    flops_ratio: float | None = None
    max_lc: float | None = None
    control: Control | None = None
    control_seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The order of all layers, the first to replace first, and the layers that are replaced."""

    order: tuple[int, ...]
    layers: tuple[int, ...]


def choose_layers(evidence: Evidence, request: Request) -> Choice:
    """Choose the layers that `request` asks for; raises Refused when no choice can meet it.

    A control gets as many layers as the ranking by LC would.
    """
    order = replacement_order(evidence.ranking, evidence.mode, control=request.control, seed=request.control_seed)
    if request.flops_ratio is not None:
        count = _count_for_flops_ratio(evidence, order, request.flops_ratio)
    elif request.max_lc is not None:
        within = _within_lc(evidence, request.max_lc)
        if request.control is None:
            # Not the first ones of the order, in which a layer above the limit may come first by a tie.
            return Choice(order=order, layers=tuple(layer for layer in order if layer in within))
        count = len(within)
    else:
        count = default_count(len(order)) if request.layers is None else request.layers
    return Choice(order=order, layers=order[: check_count(count, len(order))])


def default_count(num_layers: int) -> int:
    """Return how many layers a plan replaces by default: 0.6 L, at least one."""
    return max(1, round(0.6 * num_layers))


def replacement_order(
    ranking: Sequence[int], mode: Mode, *, control: Control | None = None, seed: int = 0
) -> tuple[int, ...]:
    """Return all layers, the first to replace first.

    `ranking` holds every layer by ascending LC. A drop-visual plan reaches the last layer, so its order starts there
    whatever the LC, and controls with another order are refused. With the same seed, a smaller set of random layers
    is part of a larger one.
    """
    num_layers = len(ranking)
    if sorted(ranking) != list(range(num_layers)):
        raise Refused(f"the ranking {list(ranking)} does not hold every layer once; run the sweep again")
    from_the_last = tuple(reversed(range(num_layers)))
    if mode is Mode.DROP_VISUAL:
        if control not in (None, Control.LAST):
            raise Refused(
                f"drop-visual always takes the last layers, a control of {control} layers cannot exist; "
                "leave the control out"
            )
        return from_the_last
    if control is None:
        return tuple(ranking)
    if control is Control.RANDOM:
        return tuple(random.Random(seed).sample(range(num_layers), num_layers))
    return tuple(range(num_layers)) if control is Control.FIRST else from_the_last


def check_count(count: int, num_layers: int) -> int:
    """Return `count` if that many layers can be replaced; raises Refused otherwise."""
    if not 1 <= count <= num_layers:
        raise Refused(f"{count} layers cannot be replaced in a model of {num_layers}; give 1 to {num_layers}")
    return count


def _count_for_flops_ratio(evidence: Evidence, order: Sequence[int], target: float) -> int:
    """Return the fewest layers of `order`, at least one, with which the FLOPs ratio is at most `target`."""
    arch, mode, ratio = evidence.architecture, evidence.mode, 1.0
    for count in range(1, len(order) + 1):
        ratio = flops_ratio(arch, modes_of_layers(mode, order[:count], arch.num_layers), evidence.t, evidence.v)
        if ratio <= target:
            return count
    raise Refused(
        f"a FLOPs ratio of {target:g} cannot be reached with {mode}: all {len(order)} layers give "
        f"{ratio:.4f} at {evidence.t:g} text and {evidence.v:g} visual tokens; ask for that or more"
    )


def _within_lc(evidence: Evidence, largest: float) -> set[int]:
    """Return the layers whose mean LC, in nats, is at most `largest`.

    LC(drop-visual, i) measures dropping from i to the last layer, so a drop-visual plan starts at the earliest layer
    within the limit, as VTW searches its exit.
    """
    means = evidence.mean_lc
    within = {layer for layer, mean in means.items() if mean <= largest}
    if not within:
        lowest = min(means, key=means.__getitem__)
        raise Refused(
            f"no layer has an LC of at most {largest:g} with {evidence.mode}: the lowest is {means[lowest]:.4g} "
            f"at layer {lowest}; tolerate more"
        )
    return set(range(min(within), len(means))) if evidence.mode is Mode.DROP_VISUAL else within
