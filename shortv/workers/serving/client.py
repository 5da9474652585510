"""Questions to replicas over a Serve handle."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import nullcontext
from typing import Any

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from shortv.request import Chunk, Completion, Failure, Likelihood, Reason, Request

# How long a handle may take to find a replica that can list its plans.
_PLANS_S = 10.0
# Plans older than the first are looked up; those older than the second are not used.
_PLANS_FRESH_S, _PLANS_KEPT_S = 1.0, 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
# Together these outlast the time until Serve no longer sends questions to a replica whose device is lost.
_LOSS_PAUSE_S = 0.5
_SUSPICIOUS, _MOST_LOSSES = 2, 5


class ReplicaClient:
    """Asks the replicas of one model; a question whose replica died goes to another one.

    A question that lost its replica twice may be what kills them: from then on such questions go one at a time, so
    that a killer dies alone, and are given up after the fifth. `patient` callers wait where the queue is full until
    the question's time is over; others get the failure.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, patient: bool = False) -> None:
        """Take the handle of the deployment of replicas."""
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._patient = patient
        self._suspects = asyncio.Lock()
        self._plans: Mapping[str, str] = {}
        self._plans_at = -math.inf
        self._looking: asyncio.Task[bool] | None = None

    async def complete(self, request: Request) -> Completion | Failure:
        """Answer one request. Raises CancelledError when the caller gives up; its place is free then."""
        found: Completion | Failure = await self._persistently(request, lambda: self._handle.complete.remote(request))
        return found

    async def score(self, request: Request) -> Likelihood | Failure:
        """Score a continuation of the conversation."""
        found: Likelihood | Failure = await self._persistently(request, lambda: self._handle.score.remote(request))
        return found

    async def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        """Answer in pieces; a replica that dies in mid-answer ends it with a failure."""
        response: Any = self._streaming.stream.remote(request)
        ended = False
        try:
            async for event in response:
                ended = not isinstance(event, Chunk)
                yield event
        except asyncio.CancelledError:
            raise
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            ended = True
            yield failure
        finally:
            if not ended:
                response.cancel()

    async def plans(self) -> Mapping[str, str]:
        """Digest of each plan by name, as one of the replicas knew them in the last seconds.

        Raises:
            TimeoutError: no replica could be asked.
        """
        if not await self._looked(_PLANS_KEPT_S):
            raise TimeoutError("no replica can list its plans")
        return self._plans

    async def healthy(self) -> bool:
        """Whether a replica answers."""
        try:
            return await self._looked(_PLANS_FRESH_S)
        except Exception:  # whatever is wrong, there is no replica to talk to
            return False

    async def _looked(self, within_s: float) -> bool:
        """Whether the plans were seen within that time; where they were not, a look that all callers share decides."""
        age = time.monotonic() - self._plans_at
        if age <= _PLANS_FRESH_S:
            return True
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return age <= within_s or await asyncio.shield(self._looking)

    async def _look(self) -> bool:
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

    async def _persistently(self, request: Request, ask: Callable[[], Any]) -> Any:
        until = time.monotonic() + request.timeout_s
        pause, losses = _FIRST_PAUSE_S, 0
        while True:
            async with self._suspects if losses >= _SUSPICIOUS else nullcontext():
                found = await _outcome(ask())
            if not isinstance(found, Failure):
                return found
            if found.reason is Reason.LOST:
                losses, pause = losses + 1, max(pause, _LOSS_PAUSE_S)
            if losses >= _MOST_LOSSES:
                return Failure(reason=Reason.LOST, message=f"{losses} replicas went away while they had the question")
            retry = found.reason is Reason.LOST or (self._patient and found.reason is Reason.OVERLOADED)
            if not retry or time.monotonic() + pause > until:
                return found
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


async def _outcome(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        failure = _failure(error)
        if failure is None:
            raise
        return failure


def _failure(error: Exception) -> Failure | None:
    """What Serve's own errors mean for a question; None for an error of the code."""
    if isinstance(error, BackPressureError):
        return Failure(reason=Reason.OVERLOADED, message="the queue is full; ask again later")
    lost = (ray.exceptions.RayActorError, DeploymentUnavailableError, RequestCancelledError)
    if isinstance(error, lost):
        return Failure(reason=Reason.LOST, message="the replica that had the question went away; ask again")
    return None
