"""Replicas without a model, which only wait: many of them in one process, as a Serve deployment of few processes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shortv.request import FULL_MODEL, Completion, EngineClock, PlanSpeed, Replies, Result, Work

BATCH = 16
# How long a simulated replica waits for the rest of a batch.
_COMPANY_S = 0.1


class Span(NamedTuple):
    """A batch of a simulated replica: when it began and ended (monotonic seconds), and its documents."""

    replica: str
    began: float
    ended: float
    documents: int

    def documents_within(self, begin: float, end: float) -> float:
        """Return how many of its documents count for a time, in proportion."""
        return self.documents * max(0.0, min(self.ended, end) - max(self.began, begin)) / (self.ended - self.began)


class WaitingReplica:
    """Has the interface of `serving.replica.Replica`, and stands for several replicas.

    Each completes up to 16 documents at a time, in `seconds` for each of their plans. A document goes to the emptier
    of two that are drawn, as Serve chooses between processes.
    """

    def __init__(self, *, replicas: int, seconds: float, digests: Mapping[str, str], trace: str) -> None:
        """Wait `seconds` per batch and plan; `digests` are those of the plans by name.

        Args:
            trace: folder for a file with the spans of this process.
        """
        self._digests, self._seconds = {**digests, FULL_MODEL: None}, seconds
        names = (f"{os.getpid()}-{number}" for number in range(replicas))
        self._engines = [_Engine(name, seconds, Path(trace, f"{os.getpid()}.jsonl")) for name in names]

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        """Wait for a place in a batch, and until the batch is over."""
        engine = min(random.choices(self._engines, k=2), key=lambda one: one.waiting)
        await engine.wait(len(works), max(len(work.plans) for work in works))
        results = tuple({plan: self._result(plan) for plan in work.plans} for work in works)
        return Replies(results=results, clock=engine.clock)

    def _result(self, plan: str) -> Result:
        return Completion(
            text="red",
            finish_reason="stop",
            completion_tokens=2,
            prompt_tokens=45,
            visual_tokens=36,
            plan_digest=self._digests[plan],
            prefill_ms=1e3 * self._seconds,
            prefill_batch=BATCH,
        )

    async def measure(self, works: Sequence[Work], *, seconds: float) -> tuple[PlanSpeed, ...]:
        """Return the same speed for every plan."""
        return tuple(
            PlanSpeed(
                plan=plan,
                batch=BATCH,
                rounds=1,
                preprocess_ms=0.0,
                vision_ms=0.0,
                prefill_ms=1e3 * self._seconds,
                prefill_ratio=1.0,
                prefill_ratio_stderr=0.0,
                decode_ms_per_token=0.0,
                kv_bytes=0.0,
                peak_bytes=None,
            )
            for plan in self._digests
        )

    async def plans(self) -> dict[str, str]:
        """Return the digest of each plan by name, without the full model."""
        return {name: digest for name, digest in self._digests.items() if digest is not None}


class _Engine:
    """One simulated replica."""

    def __init__(self, name: str, seconds: float, trace: Path) -> None:
        self._name, self._seconds, self._trace = name, seconds, trace
        self._queue: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._busy_s, self._since = 0.0, time.monotonic()
        self.waiting = 0
        """Documents that wait."""

    @property
    def clock(self) -> EngineClock:
        """How long it worked and how long it had nothing to do."""
        idle_s = time.monotonic() - self._since - self._busy_s
        return EngineClock(replica=self._name, busy_s=self._busy_s, idle_s=max(0.0, idle_s))

    async def wait(self, documents: int, plans: int) -> None:
        """Return when a batch with these documents is over."""
        if self._task is None:
            self._task, self._since = asyncio.create_task(self._work()), time.monotonic()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((documents, plans, future))
        self.waiting += documents
        self._arrived.set()
        await future

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if self.waiting < BATCH:
                await asyncio.sleep(_COMPANY_S)
            batch = self._batch()
            began = time.monotonic()
            await asyncio.sleep(self._seconds * max(plans for _, plans, _ in batch))
            span = Span(self._name, began, time.monotonic(), sum(documents for documents, _, _ in batch))
            self._busy_s += span.ended - span.began
            with self._trace.open("a") as stream:
                stream.write(json.dumps(span) + "\n")
            for _, _, future in batch:
                # A caller may have gone away.
                if not future.done():
                    future.set_result(None)

    def _batch(self) -> list[tuple[int, int, asyncio.Future[None]]]:
        """Take calls while their documents fit into a batch, and one at least."""
        batch = [self._queue.popleft()]
        while self._queue and sum(one[0] for one in batch) + self._queue[0][0] <= BATCH:
            batch.append(self._queue.popleft())
        self.waiting -= sum(documents for documents, _, _ in batch)
        if not self._queue:
            self._arrived.clear()
        return batch


def spans_in(trace: Path) -> Iterator[Span]:
    """Read the spans of all processes."""
    for file in trace.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            yield Span(*json.loads(line))
