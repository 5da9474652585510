"""The model `shortv_serve` of lmms-eval, and the endpoint's client under it."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from lmms_eval.api.instance import Instance
from PIL import Image

from shortv.errors import Refused, ShortVError
from shortv.evals import remote
from shortv.evals.benchmark import Benchmark
from shortv.evals.remote import Connection, RemoteClient, connect_url
from shortv.evals.served import ServedModel
from shortv.evals.served_settings import ServedSettings, served_settings_of
from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams
from shortv.workers.lmms_served import ShortVServe
from tests.evals.lmms_tasks import FakeClient, answer, answer_to, likelihood_of, lost, write_tasks

URL = "http://127.0.0.1:8000/v1"
DIGEST = "ab" * 32
MODELS = [
    {"id": "tiny", "shortv": {"plan": "", "plan_digest": None}},
    {"id": "tiny@fast", "shortv": {"plan": "fast", "plan_digest": DIGEST}},
    {"id": "foreign"},
]
PICTURE = Image.effect_noise((8, 6), 90).convert("RGB")
GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "until": ["</s>"]}


def completion(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The answer of an endpoint of this project."""
    digest = {entry["id"]: (entry.get("shortv") or {}).get("plan_digest") for entry in MODELS}[body["model"]]
    own = {"plan": "", "plan_digest": digest, "queue_ms": 1.5, "prefill_ms": 2.5, "decode_ms": 3.5}
    message = {"role": "assistant", "content": answer_to(texts(body))}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43, "visual_tokens": 36},
        "shortv": own,
        **more,
    }


def texts(body: dict[str, Any]) -> str:
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] for part in parts if part["type"] == "text"]
    return "".join(found)


def respond(request: httpx.Request) -> httpx.Response:
    if request.url.path.endswith("/models"):
        return httpx.Response(200, json={"data": MODELS})
    return httpx.Response(200, json=completion(json.loads(request.content)))


class Served(ServedModel):
    """Asks a function in place of an endpoint."""

    handler: Callable[[httpx.Request], httpx.Response] = staticmethod(respond)

    async def connect(self, settings: ServedSettings) -> Connection:
        return await connect_url(settings, httpx.MockTransport(self.handler))


def served(handler: Callable[[httpx.Request], httpx.Response] = respond, **settings: Any) -> ServedModel:
    kind = type("Kind", (Served,), {"handler": staticmethod(handler)})
    model: ServedModel = kind(**{"url": URL, "model": "tiny@fast", **settings})
    model.task_dict = {"pictures": {"test": list(range(40))}}
    return model


def messages(number: int) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": f"What is {number}?"}]
    return [{"role": "user", "content": content}]


def instance(at: int, kind: str = "generate_until", doc_to_messages: Any = messages, **more: Any) -> Instance:
    arguments = ("", doc_to_messages, {**GREEDY, **more}, at, "pictures", "test")
    return Instance(kind, arguments, idx=0, metadata={"task": "pictures", "doc_id": at, "repeats": 1})


def test_answers_come_in_order_with_their_token_counts() -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            bodies.append(json.loads(request.content))
        return respond(request)

    model = served(handler, num_concurrent="4")
    found = model.generate_until([instance(at) for at in range(40)])
    assert [result.text for result in found] == [answer_to(f"What is {at}?") for at in range(40)]
    assert (found[0].token_counts.input_tokens, found[0].token_counts.output_tokens) == (40, 3)
    body = bodies[0]
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "tiny@fast",
        "max_tokens": 8,
        "temperature": 0.0,
        "stop": ["</s>"],
    }
    image, text = body["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and text == {"type": "text", "text": "What is 0?"}
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == PICTURE.tobytes()
    # The same request twice is a repeat: drawn anew, and the same in another run.
    twice = instance(0, temperature=0.7, top_k=5, min_new_tokens=2)
    for _ in range(2):
        model.generate_until([twice, twice])
    seeds = [body["seed"] for body in bodies[-4:]]
    assert sorted(seeds[:2]) == sorted(seeds[2:]) and len(set(seeds)) == 2
    assert bodies[-1]["shortv"] == {"top_k": 5, "min_tokens": 2}


def test_rounds_are_held_as_the_model_in_one_process_holds_them() -> None:
    def rounds(number: int, round_idx: int = 0, previous_output: Any = None, previous_round_info: Any = None) -> Any:
        if round_idx == 0:
            return messages(number)
        assert len(previous_output) == round_idx and previous_round_info == (round_idx - 1 or None)
        return (
            (None if round_idx > number else messages(10 * round_idx)),
            round_idx > number,
            previous_output,
            round_idx,
        )

    found = served().generate_until_multi_round([instance(at, "generate_until_multi_round", rounds) for at in range(3)])
    first = [answer_to(f"What is {at}?") for at in range(3)]
    later = [answer_to(f"What is {10 * at}?") for at in (1, 2)]
    assert found == [[first[0]], [first[1], later[0]], [first[2], *later]]


def test_a_request_that_fails_ends_the_run_and_names_its_document() -> None:
    def broken(number: int) -> Any:
        raise KeyError("no such column")

    def failing(status: int, body: Any) -> Callable[[httpx.Request], httpx.Response]:
        def handler(request: httpx.Request) -> httpx.Response:
            if request.method == "POST" and "is 3?" in texts(json.loads(request.content)):
                return httpx.Response(status, json=body)
            return respond(request)

        return handler

    error = {"error": {"message": "image 0 cannot\nbe decoded", "type": "invalid_request_error"}}
    nothing = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    cut = {"choices": [{"message": {"content": "re"}, "finish_reason": "abort"}]}
    cases = {
        r"no answer \(invalid\): the endpoint says 400: image 0 cannot be decoded": failing(400, error),
        r"no answer \(internal\): the endpoint says 500": failing(500, "oh"),
        r"no answer \(internal\): .*NoneType as text": failing(200, nothing),
        r"finish_reason 'abort'": failing(200, cut),
        r"not in OpenAI's form \(KeyError: 'choices'\)": failing(200, {}),
    }
    for message, handler in cases.items():
        with pytest.raises(ShortVError, match=r"document 3 of task 'pictures' .*" + message):
            served(handler).generate_until([instance(at) for at in range(6)])
    with pytest.raises(ShortVError, match=r"^document 3 of task 'pictures' gives no prompt: KeyError"):
        served().generate_until([instance(3, doc_to_messages=broken)])
    with pytest.raises(Refused, match="num_beams=4"):
        served().generate_until([instance(3, num_beams=4)])
    with pytest.raises(ShortVError, match="answered under plan digest None, and the run began under abab"):
        served(failing(200, completion({"model": "tiny", "messages": []}))).generate_until([instance(3)])


def test_a_url_carries_no_likelihood() -> None:
    arguments = ("Is it?", " red", lambda number: None, 0, "pictures", "test")
    request = Instance("loglikelihood", arguments, idx=0, metadata={"task": "pictures", "doc_id": 0, "repeats": 1})
    with pytest.raises(Refused, match="a URL cannot carry likelihood"):
        served().loglikelihood([request])

    class Handle(ServedModel):
        async def connect(self, settings: ServedSettings) -> Connection:
            return Connection(FakeClient(), "", None)

    model = Handle(app="shortv")
    model.task_dict = {"pictures": {"test": [0]}}
    assert model.loglikelihood([request]) == [tuple(likelihood_of("Is it?", " red"))]


def test_settings_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    cases = {
        "url=http://x/v1,pretrained=y": "no setting 'pretrained'; it knows api_key_file, app",
        "model=tiny": "needs url=.* or app=NAME",
        f"url={URL},app=shortv": "one of them",
        "url=127.0.0.1:8000,model=a": "no address of an endpoint",
        "url=http://me:secret@host/v1,model=a": "holds a password",
        f"url={URL},model=tiny@fast,plan=slow": "name one plan",
        f"url={URL},model=tiny,num_concurrent=0": "num_concurrent=0 is no whole number above 0",
        f"url={URL},model=tiny,timeout=soon": "timeout=soon is no number",
        f"url={URL},model=tiny,api_key_file={tmp_path}/none": "cannot be read",
        f"url={URL},model=tiny,api_key_file={tmp_path}/empty": "is empty",
        f"url={URL},model=tiny@slow": r"no model 'tiny@slow'; set model= to one of foreign, tiny, tiny@fast",
        f"url={URL}": "asked for no model",
        f"url={URL},model=tiny@fast,plan_digest=0123456789abcdef": f"has digest {DIGEST}, not",
        f"url={URL},model=tiny,plan_digest={DIGEST}": "has digest None, not",
    }
    for text, message in cases.items():
        with pytest.raises(Refused, match=message):
            Served.create_from_arg_string(text, {"batch_size": 1, "device": None})
    with pytest.raises(Refused, match="app=shortv cannot be asked from here"):
        ServedModel.create_from_arg_string("app=shortv")
    assert served_settings_of(url=f"{URL}/", model="a", plan="b").served_name == "a@b"


def test_an_endpoint_that_is_none_is_said() -> None:
    with pytest.raises(ShortVError, match=r"cannot be reached: .*is the endpoint running"):
        ShortVServe(url="http://127.0.0.1:9/v1", model="tiny")
    with pytest.raises(Refused, match="does not accept the key"):
        served(lambda request: httpx.Response(401, json={}))
    with pytest.raises(ShortVError, match="answers 200 and lists no models"):
        served(lambda request: httpx.Response(200, text="hello"))
    foreign = [{"id": "tiny@fast"}]
    with pytest.raises(Refused, match="does not say which plan"):
        served(lambda request: httpx.Response(200, json={"data": foreign}))
    assert served(model="foreign").plan_digest is None


def test_the_key_is_sent_and_the_response_cache_keys_on_the_plan(tmp_path: Path) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    (tmp_path / "key").write_text("sk-1\n")

    def handler(request: httpx.Request) -> httpx.Response:
        return respond(request) if request.headers.get("Authorization") == "Bearer sk-1" else httpx.Response(401)

    kind = type("Kind", (Served,), {"handler": staticmethod(handler)})
    text = f"url={URL},model=tiny@fast,api_key_file={tmp_path}/key"
    kind.create_from_arg_string(text)
    cache = ResponseCache.create(str(tmp_path), model="shortv_serve", model_args=text)
    cache.close()
    assert DIGEST in cache.model_fingerprint and "sk-1" not in cache.model_fingerprint


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Where the client would wait, it notes for how long."""
    found: list[float] = []

    async def note(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(remote, "asyncio", SimpleNamespace(sleep=note))
    return found


def ask(handler: Callable[[httpx.Request], httpx.Response], **more: Any) -> Completion | Failure:
    async def run() -> Completion | Failure:
        async with httpx.AsyncClient(base_url=f"{URL}/", transport=httpx.MockTransport(handler)) as http:
            turns = (
                Message(role="system", parts=("Be brief.",)),
                Message(role="user", parts=("What", b"\xff\xd8jpeg")),
            )
            return await RemoteClient(http, "tiny").complete(Request(request_id="1", messages=turns, **more))

    return asyncio.run(run())


def test_what_passes_is_tried_again(pauses: list[float]) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    told: list[Any] = [
        httpx.Response(429, headers={"Retry-After": "3"}),
        httpx.Response(503, headers={"Retry-After": date}),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("gone"),
    ]

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        if not told:
            assert body["top_logprobs"] == 1
            entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}
            found = completion(body)
            found["choices"][0]["logprobs"] = {"content": [entry]}
            return httpx.Response(200, json=found)
        outcome = told.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, httpx.Response)
        return outcome

    found = ask(handler, sampling=SamplingParams(top_logprobs=1))
    assert isinstance(found, Completion)
    assert (found.queue_ms, found.prefill_ms, found.decode_ms, found.visual_tokens) == (1.5, 2.5, 3.5, 36)
    assert found.logprobs[0] == ("a", -0.5, (("b", -1.0),))
    assert len(pauses) == 4 and 3 <= pauses[0] < 4 and 0.5 <= pauses[1] < 1


def test_trying_again_has_an_end(pauses: list[float]) -> None:
    tried: list[int] = []

    def busy(request: httpx.Request) -> httpx.Response:
        tried.append(1)
        return httpx.Response(503, json={"error": {"message": "the queue is full"}})

    full = Failure(reason=Reason.OVERLOADED, message="the endpoint says 503: the queue is full")
    assert ask(busy) == full and len(tried) == 20 and sum(pauses) < 200
    tried.clear()
    assert ask(busy, timeout_s=0.1) == full and len(tried) == 1

    def slow(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    assert ask(slow) == Failure(reason=Reason.DEADLINE, message="the endpoint gave no answer in time")
    unknown = ask(lambda request: httpx.Response(404, json={"error": {"message": "no model 'a'"}}))
    assert unknown == Failure(reason=Reason.UNKNOWN_PLAN, message="the endpoint says 404: no model 'a'")


@contextmanager
def endpoint() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send({"data": MODELS})

        def do_POST(self) -> None:
            self._send(completion(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("task", ["filtered", "rounds"])
def test_lmms_eval_finds_the_model_and_scores_as_a_benchmark(task: str, tmp_path: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    folder = write_tasks(tmp_path / "tasks")
    tags = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
    arguments = SimpleNamespace(process_with_media=False, reasoning_tags=tags, output_path=str(tmp_path))
    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    with endpoint() as url:
        found = simple_evaluate(
            "shortv_serve",
            model_args=f"url={url},model=tiny,plan=fast,num_concurrent=4",
            tasks=[task],
            task_manager=manager,
            cli_args=arguments,
        )
        benchmark = Benchmark(task, include_path=folder)
        scored = benchmark.score(asyncio.run(_replies(benchmark, url)))
    assert scored.metrics and not any(sample.error for sample in scored.samples)
    for row in scored.metrics:
        assert found["results"][task][f"{row.metric},{row.filter}"] == row.value


async def _replies(benchmark: Benchmark, url: str) -> Any:
    from shortv.evals.asking import replies_to

    connection = await connect_url(ServedSettings(url=url, model="tiny", plan="fast"))
    try:
        return await replies_to(connection.client, benchmark.asks(), plan=connection.plan, concurrency=4)
    finally:
        await connection.client.aclose()


def test_lost_replicas_end_the_run_where_a_handle_asks() -> None:
    class Handle(ServedModel):
        async def connect(self, settings: ServedSettings) -> Connection:
            return Connection(FakeClient({"is 1?": lost(), "is 2?": answer("no").text}), "", None)

    model = Handle(app="shortv")
    model.task_dict = {"pictures": {"test": list(range(3))}}
    assert [result.text for result in model.generate_until([instance(2)])] == ["no"]
    with pytest.raises(ShortVError, match=r"document 1 of task 'pictures' has no answer \(lost\): it went away"):
        model.generate_until([instance(at) for at in range(3)])
