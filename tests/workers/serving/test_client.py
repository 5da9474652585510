"""What a client knows of the plans while replicas come and go, and what it makes of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from shortv.request import Failure, Message, Reason, Request
from shortv.workers.serving import client as module
from shortv.workers.serving.client import ReplicaClient
from tests.workers.serving.endpoint_fakes import get, problem

PLANS = {"last3": "d3"}
LOST = [ActorDiedError(), DeploymentUnavailableError("d"), RequestCancelledError()]


class FakeResponse:
    """What a handle returns for a call."""

    def __init__(self, outcome: Awaitable[Any]) -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[Any, None, Any]:
        return self._outcome.__await__()

    def cancel(self) -> None: ...


class FakeHandle:
    """Returns an outcome, raises it, or, where it is None, keeps the caller waiting as Serve does without replicas."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.calls = 0
        self.plans = self.complete = self

    def options(self, **_: Any) -> FakeHandle:
        return self

    def remote(self, *_: Any) -> FakeResponse:
        return FakeResponse(self._outcome())

    async def _outcome(self) -> Any:
        self.calls += 1
        await asyncio.sleep(0 if self.outcome is not None else 60)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock by which plans age; tests move it."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def client_of(handle: Any, **options: Any) -> ReplicaClient:
    return ReplicaClient(handle, **options)


@pytest.mark.parametrize("outcome", [ActorDiedError(), None])
def test_plans_outlive_their_replica_for_a_while(
    outcome: Exception | None, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        handle = FakeHandle(PLANS)
        client = client_of(handle)
        assert await client.plans() == PLANS
        handle.outcome = outcome
        monkeypatch.setattr(module, "_PLANS_S", 0.05)
        clock.now = 5.0
        assert await client.plans() == PLANS
        with pytest.raises(TimeoutError):
            await client.plans(fresh=True)
        clock.now = 15.0
        with pytest.raises(TimeoutError):
            await client.plans()
        monkeypatch.setattr(module, "_PLANS_S", 60.0)
        handle.outcome = {"half": "d5"}
        assert await client.plans(fresh=True) == {"half": "d5"}

    asyncio.run(go())


def test_all_requests_share_one_look(clock: SimpleNamespace) -> None:
    async def go() -> None:
        handle = FakeHandle(PLANS)
        client = client_of(handle)
        assert await asyncio.gather(*(client.plans() for _ in range(50))) == [PLANS] * 50
        assert handle.calls == 1
        # A caller who goes away leaves the look to the others.
        clock.now = 15.0
        hurried, patient = asyncio.create_task(client.plans()), asyncio.create_task(client.plans())
        await asyncio.sleep(0)
        hurried.cancel()
        assert await patient == PLANS and handle.calls == 2

    asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/models", "/healthz"])
def test_without_replicas_the_endpoint_says_when_to_ask_again(
    path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLANS_S", 0.05)
    caplog.set_level(logging.WARNING)
    for outcome in (BackPressureError(1, 1), None):
        response = get(path, client_of(FakeHandle(outcome)))
        assert problem(response, 503)["code"] == "unavailable" and response.headers["retry-after"] == "1"
    assert not caplog.records


def test_an_exception_is_the_failure_of_one_request() -> None:
    def failure(error: Exception, timeout_s: float = 0.01) -> Any:
        request = Request(request_id="1", messages=(Message(role="user", parts=("what?",)),), timeout_s=timeout_s)
        return asyncio.run(client_of(FakeHandle(error)).complete(request))

    assert {failure(error).reason for error in LOST} == {Reason.LOST}
    assert failure(BackPressureError(1, 1)).reason is Reason.OVERLOADED
    for error in (ValueError("a secret"), RayTaskError("complete", "a secret", ValueError("a secret"))):
        found = failure(error)
        assert isinstance(found, Failure) and found.reason is Reason.INTERNAL
        assert type(error).__name__ in found.message and "secret" not in found.message
