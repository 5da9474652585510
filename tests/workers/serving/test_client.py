"""What a client knows of the plans while replicas come and go, and what it makes of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from shortv.request import Completion, Failure, Message, Reason, Replies, Request, Work
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
        self.plans = self.complete_all = self

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


class DyingReplicas:
    """A handle whose replica dies with every call that holds one of the deadly requests; it keeps the calls."""

    def __init__(self, *deadly: str, once: Any = ()) -> None:
        self.deadly, self.once = set(deadly), set(once)
        self.calls: list[list[str]] = []
        self.complete_all = self

    def options(self, **_: Any) -> DyingReplicas:
        return self

    def remote(self, works: Sequence[Work]) -> FakeResponse:
        return FakeResponse(self._outcome(works))

    async def _outcome(self, works: Sequence[Work]) -> Replies:
        names = [work.request.request_id for work in works]
        self.calls.append(names)
        if self.deadly & set(names):
            raise ActorDiedError()
        dead = Failure(reason=Reason.LOST, message="the device was lost")
        done = [
            {plan: dead if (name, plan) in self.once else completion(name + plan) for plan in work.plans}
            for name, work in zip(names, works, strict=True)
        ]
        self.once.clear()
        return Replies(results=tuple(done))


def completion(text: str) -> Completion:
    return Completion(text=text, finish_reason="stop", completion_tokens=1)


def works_of(*names: str) -> list[Work]:
    message = Message(role="user", parts=("what?",))
    return [Work(request=Request(request_id=name, messages=(message,)), plans=("", "half")) for name in names]


def test_works_of_a_dead_replica_go_alone_and_only_the_deadly_one_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "_LOSS_PAUSE_S", 0.0)
    replicas = DyingReplicas("b")
    found = asyncio.run(client_of(replicas).complete_all(works_of("a", "b", "c"))).results
    assert found[0] == {"": completion("a"), "half": completion("ahalf")} and set(found[2]) == {"", "half"}
    for lost in found[1].values():
        assert isinstance(lost, Failure) and lost.reason is Reason.LOST and lost.message.startswith("5 replicas")
    together = ["a", "b", "c"]
    assert replicas.calls == [together, together, ["a"], ["b"], ["b"], ["b"], ["c"]]


def test_only_the_plans_that_were_lost_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOSS_PAUSE_S", 0.0)
    replicas = DyingReplicas(once=[("b", "half")])
    found = asyncio.run(client_of(replicas).complete_all(works_of("a", "b"))).results
    assert replicas.calls == [["a", "b"], ["b"]]
    assert found[1] == {"": completion("b"), "half": completion("bhalf")}


def test_a_patient_client_waits_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = FakeHandle(BackPressureError(1, 1))
    (impatient,) = asyncio.run(client_of(handle).complete_all(works_of("a"))).results
    assert impatient[""] == impatient["half"] and isinstance(impatient[""], Failure)

    async def pause(_: float) -> None:
        handle.outcome = Replies(results=({"": completion("a"), "half": completion("b")},))

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": pause}))
    (found,) = asyncio.run(client_of(handle, patient=True).complete_all(works_of("a"))).results
    assert found == {"": completion("a"), "half": completion("b")}
