"""Many requests through a model in batches, answers in the order of the requests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

from shortv.errors import ShortVError

T = TypeVar("T")
R = TypeVar("R")


def run_in_batches(
    items: Sequence[T],
    run: Callable[[Sequence[T]], Sequence[R]],
    *,
    group: Callable[[T], Hashable],
    length: Callable[[T], int],
    batch_size: int,
) -> list[R]:
    """Run items of one group together, the longest first, and return a result for each in the order given.

    A batch that runs out of device memory is halved until it fits.

    Raises:
        ShortVError: one item alone does not fit.
    """
    results: dict[int, R] = {}
    for positions in _batches([group(item) for item in items], [length(item) for item in items], batch_size):
        found = _halving(run, [items[position] for position in positions])
        results.update(zip(positions, found, strict=True))
    return [results[position] for position in range(len(items))]


def _batches(groups: Sequence[Hashable], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    for group in dict.fromkeys(groups):
        # The longest first, so that what does not fit shows at once and the time left is never underestimated.
        members = sorted((at for at, found in enumerate(groups) if found == group), key=lambda at: -lengths[at])
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _halving(run: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T]) -> list[R]:
    try:
        return list(run(batch))
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ShortVError(
                "one request alone does not fit the device's memory; use a device with more, a smaller dtype, "
                "or spread the model with device=auto-map"
            ) from error
    # Outside the handler: its traceback holds the tensors that did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return [*_halving(run, batch[:middle]), *_halving(run, batch[middle:])]
