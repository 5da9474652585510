"""Which sequences run together, and when a new batch begins."""

from __future__ import annotations

import time
from collections.abc import Collection

from shortv.request import Reason
from shortv.workers.serving.batch import RunningBatch
from shortv.workers.serving.sequence import Sequence


class Scheduler:
    """The waiting sequences and the running batches of an engine; for the engine's thread alone.

    A batch holds sequences of one group (`Sequence.group`). It begins with the group of the oldest waiting sequence,
    full or after `wait_ms`. New batches, and small ones while many sequences wait, begin beside `max_batches` others
    only if no place has become free for `patience_s`.
    """

    def __init__(self, *, batch_size: int, max_batches: int, wait_ms: float, patience_s: float) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[RunningBatch] = []
        self._batch_size = batch_size
        self._max_batches = max_batches
        self._wait_s = wait_ms / 1e3
        self._patience_s = patience_s
        self._free = batch_size
        self._changed = time.monotonic()

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that run and sequences that wait; cancelled ones do not count."""
        return sum(batch.size for batch in self.running), sum(not one.over for one in self.waiting)

    @property
    def all(self) -> list[Sequence]:
        """All sequences."""
        return [*self.waiting, *(one for batch in self.running for one in batch.sequences)]

    def due_in(self) -> float:
        """Return the seconds until the oldest waiting sequence no longer waits for company."""
        return self.waiting[0].arrived + self._wait_s - time.monotonic()

    def drop_finished(self) -> None:
        """Fail sequences beyond their time limit; remove those that are finished or cancelled, and empty batches."""
        for one in self.all:
            if one.overdue and not one.over:
                problem = f"no completion within {one.request.timeout_s:g} s; request fewer tokens, or try later"
                one.fail(Reason.DEADLINE, problem)
        self.waiting = [one for one in self.waiting if not one.over]
        self.running = [batch for batch in self.running if batch.size]

    def next_batch(self) -> list[Sequence]:
        """Return the sequences to prefill now, or none yet."""
        free = self._batch_size - sum(batch.size for batch in self.running)
        if free != self._free:
            self._free, self._changed = free, time.monotonic()
        if not self.waiting or free < 1:
            return []
        first = self.waiting[0]
        size = min(free, first.max_batch)
        # A sequence that may run in smaller batches only begins when it is the oldest.
        group = [one for one in self.waiting if one.group == first.group and one.max_batch >= size]
        if len(group) < size and self.due_in() > 0:
            return []
        # With a long queue a few places are not worth a prefill and steps of their own, unless no others come.
        few = len(group) > free and free < self._batch_size // self._max_batches
        if few or len(self.running) >= self._max_batches:
            return group[:size] if time.monotonic() - self._changed > self._patience_s else []
        return group[:size]

    def begin(self, sequences: Collection[Sequence], batch: RunningBatch | None) -> None:
        """Take sequences from the queue; those with a batch run from now on."""
        # In this order no sequence is ever counted twice.
        self.waiting = [one for one in self.waiting if one not in sequences]
        self.running += [batch] if batch is not None else []

    def retry(self, sequences: list[Sequence]) -> bool:
        """Queue the sequences of a failed batch again, for batches of half its size; False if there was only one."""
        self.running = [batch for batch in self.running if not set(batch.sequences) & set(sequences)]
        self.waiting = [one for one in self.waiting if one not in sequences]
        if len(sequences) == 1:
            return False
        left = [one for one in sequences if not one.over]
        for one in left:
            one.max_batch = max(1, len(sequences) // 2)
        self.waiting = [*left, *self.waiting]
        return True
