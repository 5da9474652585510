"""What a client knows of the plans while replicas come and go, and what it makes of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from starlette.testclient import TestClient

from shortv.request import Failure, Message, Reason, Request
from shortv.workers.serving import client as module
from shortv.workers.serving.client import ReplicaClient
from tests.workers.serving.endpoint_fakes import app_of

PLANS = {"last3": "d3"}


class FakeResponse:
    """What a handle returns for a call."""

    def __init__(self, outcome: Awaitable[Any]) -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[Any, None, Any]:
        return self._outcome.__await__()

    def cancel(self) -> None: ...


class FakeHandle:
    """Lists plans, raises an error, or, where that is None, keeps the caller waiting as Serve does without replicas."""

    def __init__(self, outcome: Mapping[str, str] | Exception | None) -> None:
        self.outcome = outcome
        self.looks = 0
        self.plans = self

    def options(self, **_: Any) -> FakeHandle:
        return self

    def remote(self) -> FakeResponse:
        return FakeResponse(self._outcome())

    async def _outcome(self) -> Mapping[str, str]:
        self.looks += 1
        await asyncio.sleep(0.01 if self.outcome is not None else 60)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome or {}


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLANS_S", 0.2)
    monkeypatch.setattr(module, "_PLANS_FRESH_S", 0.05)
    monkeypatch.setattr(module, "_PLANS_KEPT_S", 0.4)


LOST = [ActorDiedError(), DeploymentUnavailableError("d"), RequestCancelledError(), BackPressureError(1, 1), None]


@pytest.mark.parametrize("outcome", LOST)
def test_plans_outlive_their_replica_for_a_while(outcome: Exception | None) -> None:
    async def go() -> None:
        handle = FakeHandle(PLANS)
        client = ReplicaClient(handle)  # type: ignore[arg-type]
        assert await client.plans() == PLANS
        handle.outcome = outcome
        await asyncio.sleep(0.1)
        assert await client.plans() == PLANS
        with pytest.raises(TimeoutError):
            await client.plans(fresh=True)
        await asyncio.sleep(0.4)
        with pytest.raises(TimeoutError):
            await client.plans()
        handle.outcome = {"half": "d5"}
        assert await client.plans(fresh=True) == {"half": "d5"}

    asyncio.run(go())


def test_all_requests_share_one_look() -> None:
    async def go() -> None:
        handle = FakeHandle(PLANS)
        client = ReplicaClient(handle)  # type: ignore[arg-type]
        assert await asyncio.gather(*(client.plans() for _ in range(50))) == [PLANS] * 50
        assert handle.looks == 1
        # A caller who goes away leaves the look to the others.
        await asyncio.sleep(0.5)
        hurried, patient = asyncio.create_task(client.plans()), asyncio.create_task(client.plans())
        await asyncio.sleep(0)
        hurried.cancel()
        assert await patient == PLANS and handle.looks == 2

    asyncio.run(go())


@pytest.mark.parametrize("outcome", LOST)
@pytest.mark.parametrize("ask", [lambda client: client.get("/v1/models"), lambda client: client.get("/healthz")])
def test_without_replicas_the_endpoint_says_when_to_ask_again(
    outcome: Exception | None, ask: Callable[[TestClient], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    app = app_of(ReplicaClient(FakeHandle(outcome)))  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        response = ask(client)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "unavailable"
    assert not caplog.records


@pytest.mark.parametrize(
    "error", [ValueError("a secret"), RayTaskError("complete", "a secret", ValueError("a secret"))]
)
def test_a_stray_exception_is_the_failure_of_one_request(error: Exception) -> None:
    async def raising() -> Any:
        raise error

    class Handle(FakeHandle):
        complete: Any = SimpleNamespace(remote=lambda _: FakeResponse(raising()))

    client = ReplicaClient(Handle(PLANS))  # type: ignore[arg-type]
    request = Request(request_id="1", messages=(Message(role="user", parts=("what?",)),))
    found = asyncio.run(client.complete(request))
    assert isinstance(found, Failure) and found.reason is Reason.INTERNAL
    assert type(error).__name__ in found.message and "secret" not in found.message
