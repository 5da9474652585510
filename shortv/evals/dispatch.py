"""Many requests to replicas at once, and the response to each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from shortv.errors import ShortVError, one_line
from shortv.evals.requests import Conversation, Documents
from shortv.request import FULL_MODEL, Completion, Failure, Likelihood, Reason, Request


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

    @classmethod
    def of(cls, conversation: Conversation, **more: Any) -> Response:
        """Return what a conversation has come to."""
        texts, completions = tuple(conversation.texts), tuple(conversation.completions)
        return cls(texts=texts, completions=completions, likelihood=conversation.likelihood, **more)


async def send_all(
    client: Client,
    instances: Sequence[Any],
    documents: Documents,
    *,
    plan: str = FULL_MODEL,
    seed: int,
    concurrency: int,
    timeout_s: float = 600.0,
    on_response: Callable[[Conversation, Response], None] | None = None,
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
    responses: dict[int, Response] = {}
    repeats: Counter[int] = Counter()
    waiting = enumerate(instances)
    # One thread: tasks are third-party code that was written to be called by one.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shortv-requests")

    async def work() -> None:
        for at, instance in waiting:
            repeat = repeats[id(instance)]
            repeats[id(instance)] += 1
            conversation = Conversation(instance, documents)
            make = partial(conversation.request, plan=plan, timeout_s=timeout_s, seed=seed, repeat=repeat)
            started = time.perf_counter()
            failure = await _converse(client, conversation, make, pool)
            latency_ms = 1e3 * (time.perf_counter() - started)
            responses[at] = Response.of(conversation, failure=failure, latency_ms=latency_ms)
            if on_response is not None:
                on_response(conversation, responses[at])

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        # The first error ends the other workers.
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        pool.shutdown(wait=False, cancel_futures=True)
    return [responses[at] for at in range(len(instances))]


async def _converse(
    client: Client, conversation: Conversation, make: Callable[[], Request], pool: ThreadPoolExecutor
) -> Failure | None:
    """Complete a conversation in place; returns the failure that ended it, if any."""
    loop = asyncio.get_running_loop()
    try:
        while not conversation.over:
            request = await loop.run_in_executor(pool, make)
            found = await (client.score(request) if conversation.scored else client.complete(request))
            if isinstance(found, Failure):
                return found
            if conversation.multi_round:
                await loop.run_in_executor(pool, conversation.add, found)
            else:
                conversation.add(found)
    except ShortVError as error:
        return Failure(reason=Reason.INVALID, message=one_line(error, limit=1000))
    except Exception as error:  # one request's failure must not end the others
        return Failure(reason=Reason.INTERNAL, message=f"{type(error).__name__}: {one_line(error)}")
    return None
