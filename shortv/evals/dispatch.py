"""Many requests to replicas at once, and the response to each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from shortv.errors import ShortVError, one_line
from shortv.evals.requests import Conversation, Documents
from shortv.request import FULL_MODEL, Completion, Failure, Likelihood, Reason, Request

R = TypeVar("R")


class Client(Protocol):
    """Sends requests to replicas. What goes wrong with one request is a Failure, never an exception."""

    async def complete(self, request: Request) -> Completion | Failure:
        """Complete a conversation."""

    async def score(self, request: Request) -> Likelihood | Failure:
        """Score the request's continuation."""

    async def aclose(self) -> None:
        """Close connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The result of one instance; with a failure the rest is incomplete and must not be scored."""

    texts: tuple[str, ...] = ()
    """The completion, or those of all rounds as the task keeps them."""
    completions: tuple[Completion, ...] = ()
    likelihood: Likelihood | None = None
    failure: Failure | None = None
    latency_ms: float = 0.0
    """From the start of the first round to the end of the last, image encoding included."""


OnResponse = Callable[[Conversation, Response], None]


async def send_all(
    client: Client,
    instances: Sequence[Any],
    documents: Documents,
    *,
    plan: str = FULL_MODEL,
    seed: int,
    concurrency: int,
    timeout_s: float = 600.0,
    on_response: OnResponse | None = None,
) -> list[Response]:
    """Send the requests of lmms-eval's instances under a plan, and return the responses in the order of the instances.

    An instance that is listed several times is repeated; repeats of a sampled completion are drawn differently, and
    the same in every run. Documents are read one at a time, when their request is due, beside the event loop; a
    document that gives no request is an invalid one.

    Args:
        concurrency: the most requests in flight.
        timeout_s: the time limit of a request, in seconds.
        on_response: called with each response as it comes; an exception that it raises ends everything.
    """
    repeats: dict[int, int] = {}

    async def send(instance: Any, repeat: int) -> Response:
        conversation = Conversation(instance, documents)
        started = time.perf_counter()
        make = partial(conversation.request, plan=plan, timeout_s=timeout_s, seed=seed, repeat=repeat)
        result = await _converse(client, conversation, make, pool)
        outcome = {"failure": result} if isinstance(result, Failure) else result
        response = Response(**outcome, latency_ms=1e3 * (time.perf_counter() - started))
        if on_response is not None:
            on_response(conversation, response)
        return response

    jobs = []
    for instance in instances:
        repeat = repeats[id(instance)] = repeats.get(id(instance), -1) + 1
        jobs.append(partial(send, instance, repeat))
    # One thread: tasks are third-party code that was written to be called by one.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shortv-requests")
    try:
        return await run_all(jobs, concurrency=concurrency)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


async def _converse(
    client: Client, conversation: Conversation, make: Callable[[], Request], pool: Executor
) -> dict[str, Any] | Failure:
    completions: list[Completion] = []
    while not conversation.over:
        request = await _beside(pool, make)
        if isinstance(request, Failure):
            return request
        if request.continuation is not None:
            likelihood = await _guarded(client.score(request))
            return likelihood if isinstance(likelihood, Failure) else {"likelihood": likelihood}
        completion = await _guarded(client.complete(request))
        if isinstance(completion, Failure):
            return completion
        completions.append(completion)
        if not conversation.multi_round:
            conversation.add(completion.text)
        elif isinstance(failure := await _beside(pool, partial(conversation.add, completion.text)), Failure):
            return failure
    return {"completions": tuple(completions), "texts": tuple(conversation.texts)}


async def _guarded(result: Awaitable[R | Failure]) -> R | Failure:
    """Make an unexpected exception of a client the failure of its request."""
    try:
        return await result
    except ShortVError:
        raise
    except Exception as error:  # one request's failure must not end the others
        return Failure(reason=Reason.INTERNAL, message=f"{type(error).__name__}: {one_line(error)}")


async def _beside(pool: Executor, function: Callable[[], R]) -> R | Failure:
    """Run a task's own code beside the event loop; its failure is that of an invalid request."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function)
    except ShortVError as error:
        return Failure(reason=Reason.INVALID, message=one_line(error, limit=1000))


async def run_all(jobs: Iterable[Callable[[], Awaitable[R]]], *, concurrency: int) -> list[R]:
    """Run jobs, at most `concurrency` at once, and return their results in order; the first error ends the others."""
    waiting = enumerate(jobs)
    results: dict[int, R] = {}

    async def work() -> None:
        for at, job in waiting:
            results[at] = await job()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [results[at] for at in range(len(results))]
