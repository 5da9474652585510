"""What a training worker tells the driver, through a short queue that holds it back when the driver is busy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shortv.errors import ShortVError
from shortv.records import ErrorRecord
from shortv.workers.training.checkpoint import to_bytes
from shortv.workers.training.rows import StepRow

LENGTH = 4
"""Messages that may wait for the driver; checkpoints are among them."""
SECONDS_TO_TAKE = 1800.0
SECONDS_BETWEEN_PROGRESS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A step has ended; not every step is told."""

    row: StepRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Samples that cannot be used."""

    errors: tuple[ErrorRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint, and the rows since the one before."""

    step: int
    content: bytes
    rows: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The end: files of the result folder by name, in the order in which they are to be written."""

    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The training cannot go on, and would not the next time."""

    message: str


class QueueReport:
    """Sends what the loop reports; a Reporting."""

    def __init__(self, queue: Any, identity: str) -> None:
        """Take a `ray.util.queue.Queue` of the driver, and the digest that ties checkpoints to their run."""
        self._queue = queue
        self._identity = identity
        self._last = -SECONDS_BETWEEN_PROGRESS

    def send(self, message: Any) -> None:
        """Put a message into the queue. Raises ShortVError when the driver takes none for long."""
        from ray.util.queue import Full

        try:
            self._queue.put(message, timeout=SECONDS_TO_TAKE)
        except Full as error:
            raise ShortVError(f"the driver took no message for {SECONDS_TO_TAKE:g} s; is its disk full?") from error

    def progress(self, row: StepRow) -> None:
        """Tell of a step, unless one was told just before."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_PROGRESS:
            self._last = now
            self.send(Progressed(row=row))

    def errors(self, errors: Sequence[ErrorRecord]) -> None:
        """Tell of unusable samples."""
        self.send(Unusable(errors=tuple(errors)))

    def checkpoint(self, step: int, state: Mapping[str, Tensor], rows: Sequence[StepRow]) -> None:
        """Send a checkpoint whole."""
        self.send(Saved(step=step, content=to_bytes(step, state, self._identity), rows=tuple(rows)))
