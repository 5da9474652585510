"""The model `shortv_serve` of lmms-eval, and the endpoint's client under it."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lmms_eval.api.instance import Instance
from PIL import Image

from shortv.errors import Refused, ShortVError
from shortv.evals import remote
from shortv.evals.benchmark import Benchmark
from shortv.evals.remote import Connection, RemoteClient, ServedSpec, connect_url, open_endpoint
from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams
from shortv.workers.lmms_served import ShortVServe
from tests.evals.lmms_tasks import FakeClient, answer_to, likelihood_of, simple_evaluation, write_tasks

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


class Reply(NamedTuple):
    """What an endpoint sends back; a text body is sent as it is."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = {}


LISTED = Reply(200, {"data": MODELS})
Handler = Callable[[Any], Reply]
"""From the JSON body of a completion request to the reply."""


def respond(body: Any) -> Reply:
    return Reply(200, completion(body))


@contextmanager
def endpoint(handler: Handler = respond, models: Reply = LISTED, key: str = "") -> Iterator[str]:
    """The URL of an endpoint on this machine that replies as `handler` says."""

    class OnPort(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(models)

        def do_POST(self) -> None:
            self._send(handler(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, reply: Reply) -> None:
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                reply = Reply(401, {"error": {"message": "no"}})
            content = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "text/plain" if isinstance(reply.body, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), OnPort)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(handler: Handler = respond, models: Reply = LISTED, **settings: Any) -> Iterator[Any]:
    """The model of lmms-eval before such an endpoint."""
    with endpoint(handler, models) as url:
        model = ShortVServe(**{"url": url, "model": "tiny@fast", **settings})
        model.task_dict = {"pictures": {"test": list(range(40))}}
        yield model


def messages(number: int) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": f"What is {number}?"}]
    return [{"role": "user", "content": content}]


def instance(at: int, kind: str = "generate_until", doc_to_messages: Any = messages, **more: Any) -> Instance:
    arguments = ("", doc_to_messages, {**GREEDY, **more}, at, "pictures", "test")
    return Instance(kind, arguments, idx=0, metadata={"task": "pictures", "doc_id": at, "repeats": 1})


def test_completions_come_in_order_with_their_token_counts() -> None:
    bodies = []

    def handler(body: Any) -> Reply:
        bodies.append(body)
        return respond(body)

    # The same request twice is a repeat: drawn anew, and the same in another run.
    twice = instance(0, temperature=0.7, top_k=5, min_new_tokens=2)
    with served(handler, num_concurrent="4") as model:
        found = model.generate_until([instance(at) for at in range(40)])
        for _ in range(2):
            model.generate_until([twice, twice])
    assert [result.text for result in found] == [answer_to(f"What is {at}?") for at in range(40)]
    assert (found[0].token_counts.input_tokens, found[0].token_counts.output_tokens) == (40, 3)
    body = next(body for body in bodies if texts(body) == "What is 0?")
    image, text = body.pop("messages")[0]["content"]
    assert body == {"model": "tiny@fast", "max_tokens": 8, "temperature": 0.0, "stop": ["</s>"]}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and text == {"type": "text", "text": "What is 0?"}
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == PICTURE.tobytes()
    seeds = [body["seed"] for body in bodies[-4:]]
    assert sorted(seeds[:2]) == sorted(seeds[2:]) and len(set(seeds)) == 2
    assert bodies[-1]["shortv"] == {"top_k": 5, "min_tokens": 2}


def test_a_request_that_fails_ends_the_run_and_names_its_document() -> None:
    def broken(number: int) -> Any:
        raise KeyError("no such column")

    def failing(status: int, body: Any) -> Handler:
        return lambda given: Reply(status, body) if "is 3?" in texts(given) else respond(given)

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
        with served(handler) as model, pytest.raises(ShortVError, match="document 3 of task 'pictures' .*" + message):
            model.generate_until([instance(at) for at in range(6)])
    with served(failing(200, completion({"model": "tiny", "messages": []}))) as model:
        with pytest.raises(ShortVError, match=r"^document 3 of task 'pictures' gives no prompt: KeyError"):
            model.generate_until([instance(3, doc_to_messages=broken)])
        with pytest.raises(ShortVError, match="num_beams=4"):
            model.generate_until([instance(3, num_beams=4)])
        with pytest.raises(ShortVError, match="answered under plan digest None, and the run began under abab"):
            model.generate_until([instance(3)])


def test_a_url_carries_no_likelihood() -> None:
    arguments = ("Is it?", " red", lambda number: None, 0, "pictures", "test")
    request = Instance("loglikelihood", arguments, idx=0, metadata={"task": "pictures", "doc_id": 0, "repeats": 1})
    with served() as model, pytest.raises(ShortVError, match="a URL cannot carry likelihood"):
        model.loglikelihood([request])

    class Handle(ShortVServe):
        async def connect(self) -> Connection:
            return Connection(FakeClient(), "", None)

    model = Handle(app="shortv")
    model.task_dict = {"pictures": {"test": [0]}}
    assert model.loglikelihood([request]) == [tuple(likelihood_of("Is it?", " red"))]


def test_settings_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with endpoint() as url:
        cases = {
            "url=http://x/v1,pretrained=y": "unknown setting 'pretrained'; the settings are url, app",
            "model=tiny": "give url=.* or app=NAME",
            f"url={url},app=shortv": "one of them",
            "url=127.0.0.1:8000,model=a": "not the address of an endpoint",
            "url=http://me:secret@host/v1,model=a": "^the url contains a password(?!.*secret)",
            f"url={url},model=tiny@fast,plan=slow": "name different plans",
            f"url={url},model=tiny,num_concurrent=0": "num_concurrent is .0",
            f"url={url},model=tiny,timeout=soon": "timeout is .soon",
            f"url={url},model=ti\0ny": "model is .*NUL",
            f"url={url},model=tiny,api_key_file={tmp_path}/none": "cannot read api_key_file",
            f"url={url},model=tiny,api_key_file={tmp_path}/empty": "is empty",
            f"url={url},model=tiny@slow": r"no model 'tiny@slow'; set model= to one of foreign, tiny, tiny@fast",
            f"url={url}": "needs the name of a model",
            f"url={url},model=tiny@fast,plan_digest=0123456789abcdef": f"has digest {DIGEST}, not",
            f"url={url},model=tiny,plan_digest={DIGEST}": "has digest None, not",
        }
        for text, message in cases.items():
            with pytest.raises(Refused, match=message) as caught:
                ShortVServe.create_from_arg_string(text, {"batch_size": 1, "device": None})
            assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_none_is_said() -> None:
    with pytest.raises(ShortVError, match=r"cannot be reached: .*is the endpoint running"):
        ShortVServe(url="http://127.0.0.1:9/v1", model="tiny")
    cases = {
        "does not accept the key": Reply(401, {}),
        "answers 200 and does not list models": Reply(200, "hello"),
        "does not say which plan": Reply(200, {"data": [{"id": "tiny@fast"}]}),
    }
    for message, models in cases.items():
        with pytest.raises(ShortVError, match=message), served(models=models):
            pass
    with served(model="foreign") as model:
        assert model.plan_digest is None


def test_the_key_is_sent_and_the_response_cache_keys_on_the_plan(tmp_path: Path) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    (tmp_path / "key").write_text("sk-1\n")
    with endpoint(key="sk-1") as url:
        text = f"url={url},model=tiny@fast,api_key_file={tmp_path}/key"
        ShortVServe.create_from_arg_string(text)
        cache = ResponseCache.create(str(tmp_path), model="shortv_serve", model_args=text)
        cache.close()
    assert DIGEST in cache.model_fingerprint and "sk-1" not in cache.model_fingerprint


def complete(handler: Handler, **more: Any) -> Completion | Failure:
    async def run(url: str) -> Completion | Failure:
        messages = (
            Message(role="system", parts=("Be brief.",)),
            Message(role="user", parts=("What", b"\xff\xd8jpeg")),
        )
        client = RemoteClient(open_endpoint(url, None), "tiny")
        try:
            return await client.complete(Request(request_id="1", messages=messages, **more))
        finally:
            await client.aclose()

    with endpoint(handler) as url:
        return asyncio.run(run(url))


def test_what_passes_is_tried_again_and_what_does_not_is_not() -> None:
    soon = {"Retry-After": "0.01"}
    failures = [Reply(429, {}, soon), Reply(503, {}, soon), Reply(502, {}, soon)]

    def handler(body: Any) -> Reply:
        if failures:
            return failures.pop(0)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert body["top_logprobs"] == 1
        entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}
        found = completion(body)
        found["choices"][0]["logprobs"] = {"content": [entry]}
        return Reply(200, found)

    found = complete(handler, sampling=SamplingParams(top_logprobs=1))
    assert isinstance(found, Completion) and not failures
    assert (found.queue_ms, found.prefill_ms, found.decode_ms, found.visual_tokens) == (1.5, 2.5, 3.5, 36)
    assert found.logprobs[0] == ("a", -0.5, (("b", -1.0),))
    tried: list[Any] = []
    for status, reason in ((500, Reason.INTERNAL), (504, Reason.DEADLINE), (404, Reason.UNKNOWN_PLAN)):
        reply = Reply(status, {"error": {"message": "no\nmodel 'a'"}}, soon)
        failure = complete(lambda body, reply=reply: tried.append(body) or reply)  # type: ignore[misc]
        assert failure == Failure(reason=reason, message=f"the endpoint says {status}: no model 'a'")
    assert len(tried) == 3


def test_trying_again_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    full = Reply(503, {"error": {"message": "the queue is full"}}, {"Retry-After": "0.001"})
    failure = complete(lambda body: tried.append(body) or full)  # type: ignore[func-returns-value]
    assert failure == Failure(reason=Reason.OVERLOADED, message="the endpoint says 503: the queue is full")
    assert len(tried) == 21
    monkeypatch.setattr(remote, "_SLACK_S", 0.0)
    later = Reply(503, {}, {"Retry-After": "100"})
    failure = complete(lambda body: later, timeout_s=0.5)
    assert failure == Failure(reason=Reason.DEADLINE, message="the endpoint gave no answer in time")


def test_lmms_eval_finds_the_model_and_scores_as_a_benchmark(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")

    async def responses(benchmark: Benchmark, url: str) -> Any:
        connection = await connect_url(ServedSpec(url=url, model="tiny", plan="fast"))
        found = await benchmark.run(connection.client, plan=connection.plan, concurrency=4)
        await connection.client.aclose()
        return found

    with endpoint() as url:
        found = simple_evaluation(
            "shortv_serve", "rounds", folder, tmp_path, model_args=f"url={url},model=tiny,plan=fast,num_concurrent=4"
        )
        benchmark = Benchmark("rounds", include_path=folder)
        scored = benchmark.score(asyncio.run(responses(benchmark, url)))
    assert scored.metrics and not any(sample.error for sample in scored.samples)
    for row in scored.metrics:
        assert found[f"{row.metric},{row.filter}"] == row.value
