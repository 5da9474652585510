"""The bundled benchmark has the same scores in process, through `shortv_serve` both ways, and by `async_openai`."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from ray import serve

from shortv.errors import Refused
from shortv.evals.benchmark import Benchmark
from shortv.evals.generation import generate
from shortv.families.preprocessing import prompt_of
from shortv.layers.apply import executing
from shortv.plan import Mode, Plan
from shortv.request import Completion, Request
from shortv.spec import ModelSpec
from shortv.workers.lmms_served import ShortVServe
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.placement import Placement
from shortv.workers.serving.app import deploy, replica_app
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.spec import EndpointSpec
from tests.evals.lmms_tasks import respond, scored
from tests.tiny_model import TINY, bundled

pytestmark = [pytest.mark.ray, pytest.mark.slow]

APP, NAME, LIMIT = "lmms", "exit-2", 40
MODEL = str(TINY / "model")


def plan() -> Plan:
    """A plan under which the bundled model is clearly worse."""
    found = bundled().architecture
    return Plan.of_layers(
        Mode.DROP_VISUAL,
        range(2, found.num_layers),
        num_layers=found.num_layers,
        name=NAME,
        model=MODEL,
        config_digest=found.config_digest,
    )


@pytest.fixture(scope="module")
def url(local_ray: None) -> Iterator[str]:
    """The address of an endpoint in this process before a replica on Serve, the application `lmms`."""
    serve.start(proxy_location="Disabled")
    model = RemoteModel(loader=ModelLoader(), spec=ModelSpec(name=MODEL), folder=None)
    app = replica_app(model, [plan()], Placement(low=1, high=1, cpus=0, gpus=0), engine=EngineSettings())
    client = ReplicaClient(deploy(app, name=APP))
    face = make_endpoint(EndpointSpec(), client)
    server = uvicorn.Server(uvicorn.Config(face, log_level="warning", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 600
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    serve.delete(APP)


class InProcess:
    """Completes with transformers' generate, one request at a time."""

    async def complete(self, request: Request) -> Completion:
        loaded, decoding = bundled(), request.sampling
        arguments = {"do_sample": False, "max_new_tokens": decoding.max_tokens}
        with executing(loaded.model, plan().modes if request.plan else (Mode.FULL,) * 8):
            (found,) = generate(loaded, [prompt_of(loaded, request.messages)], arguments, decoding.stop)
        return found


def in_process(name: str) -> Mapping[str, float]:
    benchmark = Benchmark("shapes_vqa", limit=LIMIT)
    responses = respond(benchmark, InProcess(), plan=name, concurrency=1)
    return {f"{row.metric},{row.filter}": row.value for row in scored(benchmark, responses).metrics}


def lmms_eval(model: str, model_args: str, output: Path) -> Mapping[str, float]:
    """What `python -m lmms_eval` computes, in this process."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tags = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
    arguments = SimpleNamespace(process_with_media=False, reasoning_tags=tags, output_path=str(output))
    manager = TaskManager(include_path=[str(TINY / "task")], include_defaults=False)
    found = simple_evaluate(
        model, model_args=model_args, tasks=["shapes_vqa"], task_manager=manager, limit=LIMIT, cli_args=arguments
    )["results"]["shapes_vqa"]
    return {name: value for name, value in found.items() if "," in name and "stderr" not in name}


def test_scores_are_identical_whichever_way_the_questions_go(url: str, tmp_path: Path) -> None:
    wanted = in_process(NAME)
    assert wanted["exact_match,none"] < in_process("")["exact_match,none"]
    key = "key-of-nobody-0123456789"
    for model, model_args in (
        ("shortv_serve", f"url={url},model=shortv-tiny,plan={NAME}"),
        ("shortv_serve", f"app={APP},plan={NAME},plan_digest={plan().digest[:12]},num_concurrent=8"),
        ("async_openai", f"base_url={url},model_version=shortv-tiny@{NAME},api_key={key},num_cpus=4"),
    ):
        assert lmms_eval(model, model_args, tmp_path) == wanted, model_args


@pytest.mark.usefixtures("url")
def test_an_application_or_plan_that_does_not_run_is_refused() -> None:
    with pytest.raises(Refused, match=f"no plan 'other'; it has {NAME}"):
        ShortVServe(app=APP, plan="other")
    with pytest.raises(Refused, match=f"no application 'other'; running: {APP}"):
        ShortVServe(app="other")
    with pytest.raises(Refused, match="has digest"):
        ShortVServe(app=APP, plan=NAME, plan_digest="0" * 12)
