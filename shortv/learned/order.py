"""Which samples each training step takes: by seed, the same whatever stops happened."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shortv.errors import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All samples in an order drawn anew for each epoch, cut into batches; a batch may reach over an epoch's end.

    Raises Refused on construction when there are fewer samples than a batch has.
    """

    samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise Refused(f"--batch-size is {self.batch_size}; give 1 or more")
        if self.samples < self.batch_size:
            raise Refused(
                f"{self.samples} training samples are fewer than a batch of {self.batch_size}; "
                "give more samples, or a smaller --batch-size"
            )

    def rows(self, step: int) -> tuple[int, ...]:
        """Numbers of the samples of a step, counted from 0."""
        start = step * self.batch_size
        places = (divmod(place, self.samples) for place in range(start, start + self.batch_size))
        return tuple(_epoch(self.samples, self.seed, epoch)[place] for epoch, place in places)

    def share(self, step: int, worker: int, workers: int) -> tuple[int, ...]:
        """What one of several workers takes of a step; the batch size must be a multiple of their number."""
        each = self.batch_size // workers
        return self.rows(step)[worker * each : (worker + 1) * each]


@lru_cache(maxsize=4)
def _epoch(samples: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(samples))
    random.Random(f"{seed}-order-{epoch}").shuffle(order)
    return tuple(order)
