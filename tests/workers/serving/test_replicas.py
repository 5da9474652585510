"""Replicas on a real Ray Serve: their plans change while they run, they die, and every request has its completion."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from shortv.families import load_architecture
from shortv.families.preprocessing import message_of
from shortv.plan import Mode, Plan
from shortv.request import Completion, Failure, Message, Reason, Replies, Request, SamplingParams, Work
from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.placement import Placement
from shortv.workers.serving.app import deploy, replica_app
from shortv.workers.serving.client import REPLICA, ReplicaClient
from shortv.workers.serving.replica import Replica
from shortv.workers.serving.scheduler import EngineSettings
from tests.tiny_model import TINY, calibration

pytestmark = pytest.mark.ray

MODEL = str(TINY / "model")
APP = "replicas"


@pytest.fixture(scope="module", autouse=True)
def local_serve(local_ray: None) -> None:
    serve.start(proxy_location="Disabled")


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    """Two replicas of the bundled model with the plans `a` and `b`, behind an endpoint."""
    serve_deploy(plan("a", 5, 6, 7), plan("b", 3, 4))
    yield serve.get_deployment_handle(REPLICA, app_name=APP)
    serve.delete(APP)


def serve_deploy(*plans: Plan) -> None:
    """Do what `serve deploy` does with a config file, and wait until it is done."""
    user_config = {"plans": [json.loads(plan.to_json()) for plan in plans]}
    application = {
        "name": APP,
        "import_path": "shortv.workers.serving.app:endpoint",
        "args": {"model": MODEL, "replicas": "2", "batch_size": 4, "cpus_per_replica": 0},
        "deployments": [{"name": REPLICA, "user_config": user_config}],
    }
    config = ServeDeploySchema.parse_obj({"proxy_location": "Disabled", "applications": [application]})
    _get_global_client().deploy_apps(config)
    deadline = time.monotonic() + 600
    while (found := serve.status().applications[APP]).status != "RUNNING":
        assert found.status != "DEPLOY_FAILED" and time.monotonic() < deadline, found
        time.sleep(0.1)


def plan(name: str, *layers: int) -> Plan:
    found = load_architecture(MODEL)
    sizes: Any = {"num_layers": found.num_layers, "config_digest": found.config_digest}
    return Plan.of_layers(Mode.FREEZE_VISUAL, layers, name=name, model=MODEL, **sizes)


def processes(app: str) -> dict[int, psutil.Process]:
    """The replica processes of an application of this test's own cluster, by process id."""
    children = psutil.Process().children(recursive=True)
    return {one.pid: one for one in children if f"ServeReplica:{app}:{REPLICA}" in " ".join(one.cmdline())}


def complete(handle: Any, requests: Sequence[Request], done: Callable[[Any], None] = lambda _: None) -> list[Any]:
    """Send requests, 24 at a time; return what came back, in their order."""
    client, slots = ReplicaClient(handle, patient=True), asyncio.Semaphore(24)

    async def one(request: Request) -> Any:
        async with slots:
            found = await client.complete(request)
        done(found)
        return found

    async def go() -> list[Any]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(go())


def request_of(plan: str = "", text: str = "how many?") -> Request:
    return Request(request_id=text, plan=plan, messages=(Message(role="user", parts=(text,)),))


def test_plans_come_and_go_without_a_new_process(handle: Any) -> None:
    before = processes(APP)
    assert len(before) == 2
    first = complete(handle, [request_of(name) for name in ("a", "b", "")])
    assert [found.plan_digest for found in first] == [plan("a", 5, 6, 7).digest, plan("b", 3, 4).digest, None]
    new = plan("c", 6, 7)
    serve_deploy(new, plan("b", 3, 4))
    assert processes(APP).keys() == before.keys()
    for _ in range(4):  # both replicas
        removed, added, kept = complete(handle, [request_of(name) for name in ("a", "c", "b")])
        assert isinstance(removed, Failure) and removed.reason is Reason.UNKNOWN_PLAN
        assert "the plans are: c, b" in removed.message
        assert (added.plan_digest, kept.text) == (new.digest, first[1].text)
    client = ReplicaClient(handle)
    assert asyncio.run(client.plans()) == {"c": new.digest, "b": plan("b", 3, 4).digest}


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_no_completion(handle: Any) -> None:
    sampling = SamplingParams(max_tokens=40, min_tokens=40)
    requests = [
        replace(request_of("b" if number % 2 else ""), messages=(message_of(sample),), sampling=sampling)
        for number, sample in enumerate(calibration()[:60])
    ]
    wanted = complete(handle, requests)
    victims = list(processes(APP))
    assert len(victims) == 2
    answered: list[Any] = []

    def kill(found: Any) -> None:
        answered.append(found)
        if len(answered) == 8:
            os.kill(victims[0], signal.SIGKILL)

    found = complete(handle, requests, kill)
    assert len(answered) == 60 and not psutil.pid_exists(victims[0])
    assert [(one.text, one.plan_digest) for one in found] == [(one.text, one.plan_digest) for one in wanted]
    assert len({one.text for one in wanted}) > 10


@pytest.mark.slow
def test_a_request_that_kills_every_replica_is_given_up_and_takes_no_other_with_it() -> None:
    # Defined here, so that it travels by value and its processes need not import this module, and torch with it.
    class Deadly:
        async def plans(self) -> dict[str, str]:
            return {}

        async def complete_all(self, works: Sequence[Work]) -> Replies:
            await asyncio.sleep(0.1)
            if any(work.request.request_id == "deadly" for work in works):
                os._exit(1)
            texts = [work.request.request_id for work in works]
            found = [Completion(text=text, finish_reason="stop", completion_tokens=0) for text in texts]
            return Replies(results=tuple({"": one} for one in found))

    deployment: Any = serve.deployment(Deadly, name=REPLICA, num_replicas=3, ray_actor_options={"num_cpus": 0})
    handle = deploy(deployment.bind(), name="deadly")
    names = [*map(str, range(30)), "deadly", *map(str, range(30, 60))]
    found = complete(handle, [request_of(text=name) for name in names])
    for name, one in zip(names, found, strict=True):
        if name == "deadly":
            assert isinstance(one, Failure) and one.reason is Reason.LOST and one.message.startswith("5 replicas")
        else:
            assert isinstance(one, Completion) and one.text == name
    serve.delete("deadly")


@pytest.mark.slow
def test_a_replica_that_lost_its_device_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = tmp_path / "lost"

    class AcceleratorError(RuntimeError):
        pass

    class Losing(Replica):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            Replica.__init__(self, *arguments, **options)
            prefill = self._engine._prefill

            def failing(sequences: Any) -> None:
                if not lost.exists():
                    lost.touch()
                    raise AcceleratorError("an illegal memory access was encountered")
                prefill(sequences)

            self._engine._prefill = failing  # type: ignore[method-assign]

    monkeypatch.setattr("shortv.workers.serving.app.Replica", Losing)
    model = RemoteModel(loader=ModelLoader(), spec=ModelSpec(name=MODEL), folder=None)
    place = Placement(low=1, high=1, cpus=0, gpus=0)
    handle = deploy(replica_app(model, (), place, engine=EngineSettings(batch_size=4)), name="losing")
    before = processes("losing")
    found = complete(handle, [request_of(text=text) for text in ("how many?", "what is red?")])
    assert lost.exists() and all(isinstance(one, Completion) and one.text for one in found)
    assert len(before) == 1 and processes("losing").keys().isdisjoint(before)
    serve.delete("losing")
