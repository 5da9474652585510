"""Which sequences run together, and when a new batch begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shortv.request import Reason
from shortv.workers.serving.batch import RunningBatch
from shortv.workers.serving.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine batches sequences (see `Scheduler`) and what it may use.

    A batch has at most `batch_size` sequences, and `batch_size / max_batches` of others may still run beside a full
    one. Beyond `max_queued` sequences that wait, requests are refused. `vision_bytes` bounds the cached vision
    features, `image_bytes` the decoded images of all requests. An engine that works for `stall_s` seconds without
    finishing a decoder layer or a step counts as stuck.
    """

    batch_size: int = 16
    max_batches: int = 4
    wait_s: float = 0.005
    patience_s: float = 5.0
    max_queued: int = 64
    vision_bytes: int = 1 << 30
    image_bytes: int = 2 << 30
    stall_s: float = 600.0


class Scheduler:
    """The waiting sequences and the running batches of an engine; for the engine's thread alone.

    A batch holds sequences of one group (`Sequence.group`). It begins with the group of the oldest waiting sequence,
    full or after `wait_s`. While a whole batch waits, smaller ones do not begin, and beside `max_batches` others none
    does, unless no place has become free for `patience_s`: each batch takes as many steps as its longest completion,
    so that two of half the size take twice the time of one.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[RunningBatch] = []
        self._settings = settings
        # The last sequences of a batch do not keep the next one waiting.
        self._places = settings.batch_size + settings.batch_size // settings.max_batches
        self._free = self._places
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
        return self.waiting[0].arrived + self._settings.wait_s - time.monotonic()

    def drop_finished(self) -> None:
        """Fail sequences beyond their time limit; remove those that are finished or cancelled, and empty batches."""
        for one in self.all:
            limit = one.request.timeout_s
            if time.monotonic() - one.arrived > limit and not one.over:
                one.fail(Reason.DEADLINE, f"no completion within {limit:g} s; request fewer tokens, or try later")
        self.waiting = [one for one in self.waiting if not one.over]
        self.running = [batch for batch in self.running if batch.size]

    def next_batch(self) -> list[Sequence]:
        """Return the sequences to prefill now, or none yet."""
        settings = self._settings
        free = self._places - self.load[0]
        if free != self._free:
            self._free, self._changed = free, time.monotonic()
        if not self.waiting or free < 1:
            return []
        first = self.waiting[0]
        whole = min(settings.batch_size, first.max_batch)
        size = min(free, whole)
        # A sequence that may run in smaller batches only begins when it is the oldest.
        group = [one for one in self.waiting if one.group == first.group and one.max_batch >= size]
        if len(group) < size and self.due_in() > 0:
            return []
        few = len(group) > size and size < whole
        is_patient = time.monotonic() - self._changed <= settings.patience_s
        return [] if (few or len(self.running) >= settings.max_batches) and is_patient else group[:size]

    def begin(self, batch: RunningBatch) -> None:
        """Take the sequences of a new batch from the queue."""
        # In this order no sequence is ever counted twice.
        self.waiting = [one for one in self.waiting if one not in batch.sequences]
        self.running.append(batch)

    def retry(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of a failed batch again, for batches of half its size; drop one that failed alone."""
        self.running = [batch for batch in self.running if not set(batch.sequences) & set(sequences)]
        left = [one for one in sequences if not one.over] if len(sequences) > 1 else []
        for one in left:
            one.max_batch = max(1, len(sequences) // 2)
        self.waiting = [*left, *(one for one in self.waiting if one not in sequences)]
