"""Many requests to replicas at once, and the response to each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from shortv.errors import ShortVError, one_line
from shortv.evals.requests import Conversation, Documents, as_array
from shortv.request import FULL_MODEL, Completion, Failure, Likelihood, Reason, Replies, Request, Work


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
    """From the start of the first round to the end of the last, reading the document included."""

    @classmethod
    def of(cls, conversation: Conversation, **more: Any) -> Response:
        """Return what a conversation has come to."""
        texts, completions = tuple(conversation.texts), tuple(conversation.completions)
        return cls(texts=texts, completions=completions, likelihood=conversation.likelihood, **more)

    @property
    def results(self) -> tuple[Completion | Likelihood, ...]:
        """What the model was asked for, in order."""
        return self.completions if self.likelihood is None else (self.likelihood,)


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
    while not conversation.over:
        try:
            request = await asyncio.get_running_loop().run_in_executor(pool, make)
            found = await (client.score(request) if conversation.scored else client.complete(request))
        except Exception as error:  # one request's failure must not end the others
            return _failure(error)
        failure = await _added(conversation, found, pool)
        if failure is not None:
            return failure
    return None


class WorkClient(Protocol):
    """Sends works to replicas. What goes wrong with one request is a Failure, never an exception."""

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        """Complete each work's request under each of its plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A conversation whose next request goes out under some plans; `at` is the position of its instance."""

    at: int
    repeat: int
    conversation: Conversation
    plans: tuple[str, ...]


async def respond_under_plans(
    client: WorkClient,
    instances: Sequence[Any],
    documents: Documents,
    *,
    plans: Sequence[str],
    seed: int,
    timeout_s: float,
    pool: Executor,
) -> dict[str, list[Response]]:
    """Send the requests of instances under several plans at once; returns the responses by plan, in their order.

    Each document is read and its images are decoded once, for all plans. From the second round of a task with several
    rounds on, the conversations of the plans go their own ways.

    Args:
        pool: has one thread, since tasks are third-party code that was written to be called by one.
    """
    loop, started = asyncio.get_running_loop(), time.perf_counter()
    repeats: Counter[int] = Counter()
    turns = []
    for at, instance in enumerate(instances):
        conversation = Conversation(instance, documents)
        turns.append(_Turn(at=at, repeat=repeats[id(instance)], conversation=conversation, plans=tuple(plans)))
        repeats[id(instance)] += 1
    found: dict[tuple[str, int], Response] = {}

    def end(turn: _Turn, failure: Failure | None) -> None:
        latency_ms = 1e3 * (time.perf_counter() - started)
        for plan in turn.plans:
            found[plan, turn.at] = Response.of(turn.conversation, failure=failure, latency_ms=latency_ms)

    while turns:
        works, failures = await loop.run_in_executor(pool, _works, turns, seed, timeout_s)
        for turn, failure in failures:
            end(turn, failure)
        replies = await client.complete_all([work for _, work in works])
        following: list[_Turn] = []
        for (turn, _), results in zip(works, replies.results, strict=True):
            for plan, result in results.items():
                own = replace(turn, conversation=turn.conversation.branch(), plans=(plan,))
                ended = await _added(own.conversation, result, pool)
                if ended is not None or own.conversation.over:
                    end(own, ended)
                else:
                    following.append(own)
        turns = following
    return {plan: [found[plan, at] for at in range(len(instances))] for plan in plans}


def _works(
    turns: Sequence[_Turn], seed: int, timeout_s: float
) -> tuple[list[tuple[_Turn, Work]], list[tuple[_Turn, Failure]]]:
    """Return the works of conversations, and why others have none."""
    works, failures, messages = [], [], dict[Any, Any]()
    for turn in turns:
        try:
            request = turn.conversation.request(
                timeout_s=timeout_s, seed=seed, repeat=turn.repeat, form=as_array, messages=messages
            )
        except Exception as error:  # tasks run third-party code; one request's failure must not end the others
            failures.append((turn, _failure(error)))
        else:
            works.append((turn, Work(request=request, plans=turn.plans)))
    return works, failures


async def _added(conversation: Conversation, result: Any, pool: Executor) -> Failure | None:
    """Add a result to a conversation; returns the failure that ends it, if any."""
    if isinstance(result, Failure):
        return result
    try:
        if conversation.multi_round:
            await asyncio.get_running_loop().run_in_executor(pool, conversation.add, result)
        else:
            conversation.add(result)
    except Exception as error:  # tasks run third-party code
        return _failure(error)
    return None


def _failure(error: Exception) -> Failure:
    if isinstance(error, ShortVError):
        return Failure(reason=Reason.INVALID, message=one_line(error, limit=1000))
    return Failure(reason=Reason.INTERNAL, message=f"{type(error).__name__}: {one_line(error)}")
