"""Many questions to replicas at once, and what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from shortv.errors import ShortVError
from shortv.evals.asks import Ask, Kind
from shortv.evals.rounds import Dialogue
from shortv.request import FULL_MODEL, Completion, Failure, Likelihood, Reason, Request

R = TypeVar("R")


class Client(Protocol):
    """Whoever takes questions to replicas. What goes wrong with a question is a Failure, never an exception."""

    async def complete(self, request: Request) -> Completion | Failure:
        """Answer one question."""

    async def score(self, request: Request) -> Likelihood | Failure:
        """Score a continuation of the conversation."""

    async def aclose(self) -> None:
        """Give connections back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of one Ask; where there is a failure the rest is incomplete and must not be scored."""

    texts: tuple[str, ...] = ()
    """The answer, or those of all rounds as the task keeps them."""
    answers: tuple[Completion, ...] = ()
    likelihood: Likelihood | None = None
    failure: Failure | None = None
    latency_ms: float = 0.0
    """What the asker waited, images and later rounds included."""


async def answer_all(
    client: Client,
    questions: Iterable[Callable[[], Request]],
    *,
    concurrency: int,
    told: Callable[[Completion | Failure], None] | None = None,
) -> list[Completion | Failure]:
    """Ask all questions, so many at once, and return the answers in their order.

    A question is made when its turn comes, one at a time and beside the event loop; one that cannot be made is an
    invalid one. `told` hears of each answer as it comes; what it raises ends everything.
    """
    with _makers() as making:

        async def ask(make: Callable[[], Request]) -> Completion | Failure:
            question = await _made(making, make)
            found = question if isinstance(question, Failure) else await client.complete(question)
            if told is not None:
                told(found)
            return found

        return await run_all((partial(ask, make) for make in questions), concurrency=concurrency)


async def replies_to(
    client: Client,
    asks: Iterable[Ask],
    *,
    plan: str = FULL_MODEL,
    concurrency: int,
    seconds: float = 600.0,
    told: Callable[[Ask, Reply], None] | None = None,
) -> list[Reply]:
    """Ask what lmms-eval asks, of whichever kind, under a plan; otherwise as `answer_all`."""
    with _makers() as making:

        async def ask_one(ask: Ask) -> Reply:
            started = time.perf_counter()
            holding = _Asking(client, ask, partial(ask.question, plan=plan, seconds=seconds), making)
            reply = await holding.reply(started)
            if told is not None:
                told(ask, reply)
            return reply

        return await run_all((partial(ask_one, ask) for ask in asks), concurrency=concurrency)


@dataclass(frozen=True, slots=True)
class _Asking:
    client: Client
    ask: Ask
    question: Callable[..., Request]
    making: Executor

    async def reply(self, started: float) -> Reply:
        found = await self._found()
        outcome = {"failure": found} if isinstance(found, Failure) else found
        return Reply(**outcome, latency_ms=1e3 * (time.perf_counter() - started))

    async def _found(self) -> dict[str, Any] | Failure:
        if self.ask.kind is Kind.MULTI_ROUND:
            return await self._rounds()
        question = await _made(self.making, self.question)
        if isinstance(question, Failure):
            return question
        if self.ask.kind is Kind.LIKELIHOOD:
            score = await self.client.score(question)
            return score if isinstance(score, Failure) else {"likelihood": score}
        answer = await self.client.complete(question)
        return answer if isinstance(answer, Failure) else {"answers": (answer,), "texts": (answer.text,)}

    async def _rounds(self) -> dict[str, Any] | Failure:
        if self.ask.conversation is None:
            raise AssertionError("a multi-round request has a conversation")
        dialogue = Dialogue(self.ask.conversation)
        answers: list[Completion] = []
        while dialogue.asked is not None:
            question = await _made(self.making, partial(self.question, request=dialogue.asked))
            found = question if isinstance(question, Failure) else await self.client.complete(question)
            if isinstance(found, Failure):
                return found
            answers.append(found)
            taken = await _made(self.making, partial(dialogue.take, found.text))
            if isinstance(taken, Failure):
                return taken
        return {"answers": tuple(answers), "texts": tuple(dialogue.answers)}


async def run_all(jobs: Iterable[Callable[[], Awaitable[R]]], *, concurrency: int) -> list[R]:
    """Run jobs, so many at once, and return their results in order; the first error ends the others."""
    waiting = enumerate(jobs)
    found: dict[int, R] = {}

    async def work() -> None:
        for at, job in waiting:
            found[at] = await job()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [found[at] for at in range(len(found))]


@contextmanager
def _makers() -> Any:
    # One thread: tasks are third-party code that was written to be called by one.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shortv-questions")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def _made(making: Executor, make: Callable[[], R]) -> R | Failure:
    """What a task's own code makes, beside the event loop; what it cannot make is an invalid question."""
    try:
        return await asyncio.get_running_loop().run_in_executor(making, make)
    except ShortVError as error:
        return Failure(reason=Reason.INVALID, message=" ".join(str(error).split()))
