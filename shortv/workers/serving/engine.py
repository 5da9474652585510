"""The thread of a replica that runs the model: it prefills batches, steps them, and changes plans between them.

Between two steps of the running batches a new one may be prefilled, so that no request waits for the end of a long
completion. Changing the plan takes the time of a few attribute assignments.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from shortv.errors import SampleError, ShortVError
from shortv.families import LoadedModel
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.plan import Mode
from shortv.request import EngineClock, Failure, Reason
from shortv.workers.serving.batch import RunningBatch, score
from shortv.workers.serving.scheduler import EngineSettings, Scheduler
from shortv.workers.serving.sequence import Sequence

LOG = logging.getLogger("shortv.engine")
# Errors after which a CUDA process can compute nothing any more.
POISONED = ("AcceleratorError", "CudaError")
T = TypeVar("T")


class _Job(NamedTuple):
    work: Callable[[], Any]
    future: Future[Any]


class Engine:
    """Completes sequences with one model, in one thread."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings) -> None:
        """Take the model; `start` begins to work."""
        self.settings = settings
        self.vision = VisionCache(loaded, max_bytes=settings.vision_bytes)
        self.scheduler = Scheduler(settings)
        self._loaded = loaded
        self._inbox: queue.SimpleQueue[Sequence | _Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._clock = _IdleClock()
        self._applied = ExitStack()
        self._plan: tuple[tuple[Mode, ...], Hashable] | None = None
        self._stopping = False
        self._ended = False
        self._progress_at = monotonic()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._work, name="shortv-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence, from any thread; it fails at once if there are too many."""
        most = self.settings.batch_size + self.settings.max_queued
        if sum(self.scheduler.load) + self._inbox.qsize() >= most:
            sequence.fail(Reason.OVERLOADED, f"this replica has {most} requests already; try again later")
            return
        self._inbox.put(sequence)
        if self._ended:
            self._empty_inbox()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have the thread run a function between two steps, while the model is under no plan; from any thread."""
        job = _Job(work, Future())
        self._inbox.put(job)
        if self._ended:
            self._empty_inbox()
        return job.future

    def clock(self, replica: str) -> EngineClock:
        """Return the times so far, under the name of a replica; from any thread."""
        busy_s, idle_s = self._clock.read()
        return EngineClock(replica=replica, busy_s=busy_s, idle_s=idle_s)

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its current step; the sequences left fail with `Reason.LOST`."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join(timeout)

    @property
    def trouble(self) -> str | None:
        """Why this engine can complete nothing any more, or None."""
        if self._lost is None and not self._thread.is_alive():
            return "the engine's thread has ended"
        if self._lost is None and monotonic() - self._progress_at > self.settings.stall_s:
            return f"no decoder layer and no step has ended for {self.settings.stall_s:g} s"
        return self._lost

    def _work(self) -> None:
        try:
            with ExitStack() as hooks:
                # A step of a large model on CPUs may take many minutes, a layer does not.
                for layer in self._loaded.decoder.layers:
                    hooks.callback(layer.register_forward_pre_hook(self._note_progress).remove)
                while not self._stopping and self._lost is None:
                    self._iterate()
        except BaseException as error:
            self._lost = f"the engine failed: {type(error).__name__}"
            LOG.critical("the engine failed: %s\n%s", type(error).__name__, _frames(error))
        finally:
            self._applied.close()
            self._ended = True
            left: list[Sequence | _Job] = [*self.scheduler.all, *self._jobs]
            for one in left:
                self._send_away(one)
            self._empty_inbox()

    def _note_progress(self, *_: object) -> None:
        self._progress_at = monotonic()

    def _iterate(self) -> None:
        """Prefill at most one batch, and step each running one; keep no batch that has ended."""
        self._receive()
        while self._jobs and self._lost is None:
            self._run_job(self._jobs[0])
        self.scheduler.drop_finished()
        sequences = self.scheduler.next_batch()
        if sequences:
            self._guarded(sequences, self._prefill, sequences)
        for batch in list(self.scheduler.running):
            if self._lost is None:
                self._guarded(batch.sequences, self._step, batch)

    def _receive(self) -> None:
        """Read the inbox; wait only if there is nothing to run."""
        timeout: float | None = 0.0
        if not self.scheduler.running:
            timeout = max(0.0, self.scheduler.due_in()) if self.scheduler.waiting else None
        # An idle engine is not stuck.
        self._progress_at = monotonic() if timeout is not None else float("inf")
        with suppress(queue.Empty):
            while True:
                with self._clock.idle() if timeout != 0 else nullcontext():
                    one = self._inbox.get(block=timeout != 0, timeout=timeout)
                if isinstance(one, Sequence):
                    self._clock.begin()
                    self.scheduler.waiting.append(one)
                elif one is not None:
                    self._jobs.append(one)
                timeout = 0.0
        self._note_progress()

    def _run_job(self, job: _Job) -> None:
        self._applied.close()
        self._plan = None
        try:
            job.future.set_result(job.work())
        except Exception as error:  # whatever the model or its device raises
            self._note_loss(error)
            LOG.error("a job of the engine failed: %s\n%s", type(error).__name__, _frames(error))
            job.future.set_exception(error)
        self._jobs.remove(job)

    def _prefill(self, sequences: list[Sequence]) -> None:
        self._apply_plan_of(sequences[0])
        if sequences[0].request.continuation is None:
            self.scheduler.begin(RunningBatch(self._loaded, self.vision, sequences))
        else:
            score(self._loaded, self.vision, sequences)

    def _step(self, batch: RunningBatch) -> None:
        self._apply_plan_of(batch.sequences[0])
        batch.step()
        if not batch.size:
            self.scheduler.running.remove(batch)

    def _apply_plan_of(self, sequence: Sequence) -> None:
        if self._plan != sequence.plan:
            self._applied.close()
            self._plan = None
            self._applied.enter_context(executing(self._loaded.model, sequence.modes, sequence.run))
            self._plan = sequence.plan

    def _guarded(self, sequences: list[Sequence], work: Callable[..., None], argument: object) -> None:
        """Work on sequences; if that fails they run again in two halves, down to the one that fails alone."""
        sequences = list(sequences)
        try:
            work(argument)
            return
        except Exception as error:  # whatever the model or its device raises
            if self._note_loss(error):
                return
            if len(sequences) == 1:
                sequences[0].finish(failure_of(error))
        # Outside the handler: its traceback holds the tensors of the batch.
        self.scheduler.retry(sequences)

    def _note_loss(self, error: Exception) -> bool:
        """Tell whether an error means that the device is lost, and keep that."""
        if any(kind.__name__ in POISONED for kind in type(error).__mro__):
            self._lost = f"the device was lost: {type(error).__name__}"
        return self._lost is not None

    def _empty_inbox(self) -> None:
        """Fail what arrives while the thread ends, or after it; from any thread."""
        with suppress(queue.Empty):
            while True:
                one = self._inbox.get_nowait()
                if one is not None:
                    self._send_away(one)

    def _send_away(self, one: Sequence | _Job) -> None:
        problem = self._lost or "this replica is stopping"
        if isinstance(one, Sequence):
            one.fail(Reason.LOST, problem)
        elif not one.future.done():
            one.future.set_exception(ShortVError(problem))


class _IdleClock:
    """Seconds since the first sequence, and how many of them the thread waited with nothing to run."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._waits_since: float | None = None
        self._idle_s = 0.0

    def begin(self) -> None:
        if self._began is None:
            self._began = monotonic()

    @contextmanager
    def idle(self) -> Iterator[None]:
        if self._began is None:
            yield
            return
        self._waits_since = monotonic()
        try:
            yield
        finally:
            self._idle_s += monotonic() - self._waits_since
            self._waits_since = None

    def read(self) -> tuple[float, float]:
        """Return busy and idle seconds."""
        now, since, idle_s = monotonic(), self._waits_since, self._idle_s
        idle_s += 0.0 if since is None else now - since
        return (0.0 if self._began is None else max(0.0, now - self._began - idle_s)), idle_s


def failure_of(error: Exception) -> Failure:
    """Return what an error of one request means for its caller."""
    if isinstance(error, SampleError | ShortVError):
        return Failure(reason=Reason.INVALID, message=str(error))
    # The message of a foreign error may contain a part of the conversation; the frames do not.
    LOG.error("a request failed: %s\n%s", type(error).__name__, _frames(error))
    message = f"the request failed with {type(error).__name__}; the replica goes on"
    return Failure(reason=Reason.INTERNAL, message=message)


def _frames(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__))
