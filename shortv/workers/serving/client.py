"""Requests to replicas over a Serve handle."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from shortv.request import Chunk, Completion, EngineClock, Failure, PlanSpeed, Reason, Replies, Request, Result, Work

LOG = logging.getLogger("shortv.client")
REPLICA = "Replica"
"""The deployment of replicas in an application."""
# How long a handle may take to find a replica that can list its plans.
_PLANS_S = 10.0
# Plans older than the first are looked up; those older than the second are not used.
_PLANS_FRESH_S, _PLANS_KEPT_S = 1.0, 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
# Together these outlast the time until Serve no longer routes requests to a replica whose device is lost.
_LOSS_PAUSE_S = 0.5
_SUSPICIOUS, _MAX_LOSSES = 2, 5


class ReplicaClient:
    """Sends requests to the replicas of one model; what a replica that died has not completed goes to another one.

    Works that lost their replica twice may be what kills them: from then on they go one at a time, so that none dies
    with another, and each is given up after its fifth loss. Whatever goes wrong is returned as a Failure.
    A `patient` client waits while the queue is full until the request's time is over; others return the failure.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, patient: bool = False) -> None:
        """Take the handle of the deployment of replicas."""
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._patient = patient
        self._suspects = asyncio.Lock()
        self._plans: Mapping[str, str] = {}
        self._plans_at = -math.inf
        self._lookup: asyncio.Task[bool] | None = None

    @classmethod
    def of_application(cls, name: str) -> ReplicaClient:
        """Return a patient client of the replicas of an application, in any process of the cluster."""
        return cls(serve.get_deployment_handle(REPLICA, app_name=name), patient=True)

    async def complete(self, request: Request) -> Any:
        """Return the completion of a request, the likelihood of its continuation, or a failure.

        Raises CancelledError when the caller gives up; its place is free then.
        """
        replies = await self.complete_all([Work(request=request, plans=(request.plan,))])
        return replies.results[0][request.plan]

    score = complete

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        """Complete requests, each under all of its plans, in one call of one replica; see `complete`."""
        until = time.monotonic() + max((work.request.timeout_s for work in works), default=0.0)
        return await self._complete_all(works, until=until, losses=0)

    async def _complete_all(self, works: Sequence[Work], *, until: float, losses: int) -> Replies:
        results: list[dict[str, Result]] = [{} for _ in works]
        clock: EngineClock | None = None
        pause, left = _FIRST_PAUSE_S, dict(enumerate(works))
        while left:
            if losses >= _SUSPICIOUS and len(left) > 1:
                for at, work in left.items():
                    alone = await self._complete_all([work], until=until, losses=losses)
                    results[at] |= alone.results[0]
                    clock = alone.clock or clock
                break
            async with self._suspects if losses >= _SUSPICIOUS else nullcontext():
                replies = await self._attempt(tuple(left.values()))
            for at, found in zip(left, replies.results, strict=True):
                results[at] |= found
            clock = replies.clock or clock
            left, lost = self._left(works, results)
            if lost:
                losses, pause = losses + 1, max(pause, _LOSS_PAUSE_S)
            if losses >= _MAX_LOSSES:
                given_up = Failure(reason=Reason.LOST, message=f"{losses} replicas failed while they had the request")
                for at, work in left.items():
                    results[at] |= dict.fromkeys(work.plans, given_up)
                break
            if left and time.monotonic() + pause > until:
                break
            if left:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        return Replies(results=tuple(results), clock=clock)

    def _left(self, works: Sequence[Work], results: Sequence[Mapping[str, Result]]) -> tuple[dict[int, Work], bool]:
        """Return what is to be sent again, each work with the plans that need it, and whether a replica was lost."""
        reasons = {Reason.LOST, Reason.OVERLOADED} if self._patient else {Reason.LOST}
        left, lost = {}, False
        for at, (work, found) in enumerate(zip(works, results, strict=True)):
            failed = {plan: one.reason for plan, one in found.items() if isinstance(one, Failure)}
            plans = tuple(plan for plan in work.plans if failed.get(plan) in reasons)
            if plans:
                left[at] = replace(work, plans=plans)
                lost |= Reason.LOST in failed.values()
        return left, lost

    async def _attempt(self, works: Sequence[Work]) -> Replies:
        found = await _outcome(self._handle.complete_all.remote(works))
        if isinstance(found, Failure):
            return Replies(results=tuple(dict.fromkeys(work.plans, found) for work in works))
        replies: Replies = found
        return replies

    async def measure(self, works: Sequence[Work], *, seconds: float) -> tuple[PlanSpeed, ...] | Failure:
        """Have one replica measure the plans of these works; see `Replica.measure`. Nothing is sent again."""
        found: tuple[PlanSpeed, ...] | Failure = await _outcome(self._handle.measure.remote(works, seconds=seconds))
        return found

    async def stream(self, request: Request) -> AsyncGenerator[Chunk | Completion | Failure]:
        """Complete a request in chunks; the whole completion or a failure comes last. A dead replica is a failure."""
        response: Any = self._streaming.stream.remote(request)
        ended = False
        try:
            async for event in response:
                ended = not isinstance(event, Chunk)
                yield event
        except Exception as error:
            ended = True
            yield _failure(error)
        finally:
            if not ended:
                response.cancel()

    async def plans(self, *, fresh: bool = False) -> Mapping[str, str]:
        """Return the digest of each plan by name, as a replica listed them in the last seconds, or the last if `fresh`.

        Raises:
            TimeoutError: no replica answered.
        """
        age = time.monotonic() - self._plans_at
        if age > _PLANS_FRESH_S:
            # One lookup that all callers share.
            if self._lookup is None or self._lookup.done():
                self._lookup = asyncio.create_task(self._look_up())
            if (fresh or age > _PLANS_KEPT_S) and not await asyncio.shield(self._lookup):
                raise TimeoutError("no replica can list its plans")
        return self._plans

    async def _look_up(self) -> bool:
        """Ask until a replica lists its plans."""
        try:
            async with asyncio.timeout(_PLANS_S):
                while isinstance(found := await _outcome(self._handle.plans.remote()), Failure):
                    await asyncio.sleep(_FIRST_PAUSE_S)
        except TimeoutError:
            return False
        self._plans, self._plans_at = found, time.monotonic()
        return True

    async def aclose(self) -> None:
        """Nothing to close: Serve keeps handles."""


async def _outcome(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Failure:
    """Return what an exception of Serve, of Ray or of a replica's code means for a request."""
    if isinstance(error, BackPressureError):
        return Failure(reason=Reason.OVERLOADED, message="the queue is full; try again later")
    lost = (ray.exceptions.RayActorError, DeploymentUnavailableError, RequestCancelledError)
    if isinstance(error, lost):
        return Failure(reason=Reason.LOST, message="the replica that had the request failed; send it again")
    # The message of another exception may contain a part of the conversation.
    LOG.error("a call of a replica failed: %s", type(error).__name__)
    return Failure(reason=Reason.INTERNAL, message=f"the call of a replica failed with {type(error).__name__}")
