"""The thread that answers: rows wait, run in batches of one plan, and leave one by one.

Between two steps of the running batches a new one may be prefilled, so that nobody waits for the end of a long answer,
and the plan changes from batch to batch in the time of a few attribute assignments.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from shortv.errors import SampleError, ShortVError
from shortv.evals.likelihood import likelihoods
from shortv.evals.prompts import NamedPrompt
from shortv.families import LoadedModel
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.plan import Mode
from shortv.request import Reason
from shortv.workers.serving.batch import NOT_FINITE, RunningBatch
from shortv.workers.serving.row import Row

LOG = logging.getLogger("shortv.engine")
# Errors after which a CUDA process can compute nothing any more.
POISONED = ("AcceleratorError", "CudaError")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How rows become batches.

    At most `batch_size` rows run at once, in `max_batches` batches; more batches, and small ones while many rows wait,
    begin only where no place has become free for `patience_s`. A batch that could be larger waits for company for
    `wait_ms`. Beyond `max_queued` rows that wait while `batch_size` run, rows are turned away. `vision_bytes` bounds
    the kept vision features, `image_bytes` the decoded images of all rows. An engine whose step takes longer than
    `stall_s` counts as stuck.
    """

    batch_size: int = 16
    max_batches: int = 4
    wait_ms: float = 5.0
    patience_s: float = 5.0
    max_queued: int = 64
    vision_bytes: int = 1 << 30
    image_bytes: int = 2 << 30
    stall_s: float = 300.0


class Engine:
    """Answers rows with one model, in one thread of its own."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings) -> None:
        """Take the model; `start` begins to work."""
        self.settings = settings
        self.vision = VisionCache(loaded, max_bytes=settings.vision_bytes)
        self._loaded = loaded
        self._inbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._waiting: list[Row] = []
        self._batches: list[RunningBatch] = []
        self._applied = ExitStack()
        self._plan: tuple[tuple[Mode, ...], Hashable] | None = None
        self._free = settings.batch_size
        self._moved = time.monotonic()
        self._stopping = False
        self._ended = False
        self._beat = time.monotonic()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._work, name="shortv-engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, row: Row) -> None:
        """Hand over a row, from any thread; it fails at once where too many are there already."""
        most = self.settings.batch_size + self.settings.max_queued
        if sum(self.load) >= most:
            row.fail(Reason.OVERLOADED, f"this replica has {most} requests already; ask again later")
        else:
            self._inbox.put(row)
            if self._ended:
                self._empty_inbox()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its current step; rows still there get no answer from this replica."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join(timeout)

    @property
    def trouble(self) -> str | None:
        """Why this engine can answer nothing any more, or None."""
        if self._lost is None and not self._thread.is_alive():
            return "the engine's thread has ended"
        if self._lost is None and time.monotonic() - self._beat > self.settings.stall_s:
            return f"no step has ended for {self.settings.stall_s:g} s"
        return self._lost

    @property
    def load(self) -> tuple[int, int]:
        """Rows that run and rows that wait."""
        waiting = sum(not row.over for row in self._waiting)
        return sum(batch.places for batch in self._batches), waiting + self._inbox.qsize()

    def _work(self) -> None:
        try:
            while not self._stopping and self._lost is None:
                self._turn()
        except BaseException as error:
            self._lost = f"the engine failed: {type(error).__name__}"
            LOG.critical("the engine failed: %s\n%s", type(error).__name__, _frames(error))
        finally:
            self._applied.close()
            self._ended = True
            self._give_up()

    def _turn(self) -> None:
        """At most one prefill, and a step of each batch; keeps no batch that has ended."""
        self._take_new()
        self._drop()
        rows = self._next_batch()
        if rows:
            self._guarded(rows, self._prefill, rows)
        for batch in list(self._batches):
            if self._lost is None:
                self._guarded(batch.rows, self._step, batch)

    def _take_new(self) -> None:
        """Read the inbox; sleep only where there is nothing to run."""
        timeout: float | None = 0.0
        if not self._batches:
            timeout = max(0.0, self._ripe_in()) if self._waiting else None
        while True:
            try:
                # An idle engine is not a stalled one.
                self._beat = time.monotonic() if timeout is not None else float("inf")
                row = self._inbox.get(block=timeout != 0, timeout=timeout)
            except queue.Empty:
                break
            if row is not None:
                self._waiting.append(row)
            timeout = 0.0
        self._beat = time.monotonic()

    def _ripe_in(self) -> float:
        return self._waiting[0].arrived + self.settings.wait_ms / 1e3 - time.monotonic()

    def _drop(self) -> None:
        """Rows whose time is over, waiting or running, and waiting ones that nobody waits for."""
        for row in [*self._waiting, *(row for batch in self._batches for row in batch.rows)]:
            if row.overdue and not row.over:
                row.fail(Reason.DEADLINE, f"no answer within {row.request.timeout_s:g} s; ask for less, or later")
        self._waiting = [row for row in self._waiting if not row.over]
        self._batches = [batch for batch in self._batches if batch.places]

    def _next_batch(self) -> list[Row]:
        """The rows to prefill now: those of the oldest one's group that fit, or none yet."""
        free = self.settings.batch_size - sum(batch.places for batch in self._batches)
        if free != self._free:
            self._free, self._moved = free, time.monotonic()
        if not self._waiting or free < 1:
            return []
        first = self._waiting[0]
        size = min(free, first.most_beside)
        # A row that may be in smaller batches only has its turn when it is the oldest.
        group = [row for row in self._waiting if row.group == first.group and row.most_beside >= size]
        if len(group) < size and self._ripe_in() > 0:
            return []
        # With a long queue a few places are not worth a prefill and steps of their own, unless no others come.
        few = len(group) > free and free < self.settings.batch_size // self.settings.max_batches
        if few or len(self._batches) >= self.settings.max_batches:
            return group[:size] if time.monotonic() - self._moved > self.settings.patience_s else []
        return group[:size]

    def _prefill(self, rows: Sequence[Row]) -> None:
        self._under(rows[0])
        begun = []
        if rows[0].request.continuation is None:
            begun.append(RunningBatch(self._loaded, self.vision, rows))
        else:
            self._score(rows)
        # In this order no row is ever counted twice.
        self._waiting = [row for row in self._waiting if row not in rows]
        self._batches += begun

    def _score(self, rows: Sequence[Row]) -> None:
        named = [NamedPrompt(name="it", prompt=row.prompt, continuation=row.request.continuation or "") for row in rows]
        for row, found in zip(rows, likelihoods(self._loaded, named), strict=True):
            if math.isnan(found.log_probability):
                row.fail(Reason.INTERNAL, NOT_FINITE)
            else:
                row.finish(found)

    def _step(self, batch: RunningBatch) -> None:
        self._under(batch.rows[0])
        batch.step()
        if not batch.places:
            self._batches.remove(batch)

    def _under(self, row: Row) -> None:
        if self._plan != row.plan:
            self._applied.close()
            self._plan = None
            self._applied.enter_context(executing(self._loaded.model, row.modes, row.run))
            self._plan = row.plan

    def _guarded(self, rows: Sequence[Row], work: Callable[..., None], *arguments: object) -> None:
        """Work on rows; where that fails they run again in two halves, down to the row that fails alone."""
        rows = list(rows)
        try:
            work(*arguments)
            return
        except Exception as error:  # whatever the model, its processor or its device raise
            if any(kind.__name__ in POISONED for kind in type(error).__mro__):
                self._lost = f"the device was lost: {type(error).__name__}"
                return
            self._batches = [batch for batch in self._batches if not set(batch.rows) & set(rows)]
            self._waiting = [row for row in self._waiting if row not in rows]
            left = [row for row in rows if not row.over]
            if len(rows) == 1:
                for row in left:
                    _fail(row, error)
                return
        # Outside the handler: its traceback holds the tensors of the batch.
        for row in left:
            row.most_beside = max(1, len(rows) // 2)
        self._waiting = [*left, *self._waiting]

    def _give_up(self) -> None:
        """Tell all rows that another replica has to answer them."""
        for row in [*self._waiting, *(row for batch in self._batches for row in batch.rows)]:
            self._send_away(row)
        self._empty_inbox()

    def _empty_inbox(self) -> None:
        """The same for rows that arrive while the thread ends, or after it; from any thread."""
        with suppress(queue.Empty):
            while True:
                row = self._inbox.get_nowait()
                if row is not None:
                    self._send_away(row)

    def _send_away(self, row: Row) -> None:
        row.fail(Reason.LOST, self._lost or "this replica is stopping")


def _fail(row: Row, error: Exception) -> None:
    if isinstance(error, SampleError | ShortVError):
        row.fail(Reason.INVALID, str(error))
        return
    # The message of a foreign error may hold a piece of the conversation; where it happened does not.
    LOG.error("a request failed: %s\n%s", type(error).__name__, _frames(error))
    row.fail(Reason.INTERNAL, f"the request failed with {type(error).__name__}; the replica goes on")


def _frames(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__))
