"""The model `shortv_serve` of lmms-eval, and the endpoint's client under it."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx  # what the client of openai is built on
import openai
import pytest
from lmms_eval.api.instance import Instance
from PIL import Image

from shortv.errors import Refused, ShortVError
from shortv.evals import remote
from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import send_all
from shortv.evals.remote import Connection, RemoteClient, ServedSpec, connect_url, open_endpoint
from shortv.request import Completion, Failure, Message, Reason, Request
from shortv.workers.lmms_served import ShortVServe
from tests.evals.lmms_tasks import FakeClient, answer_to, likelihood_of, scored, simple_evaluation, write_tasks

URL, DIGEST = "http://127.0.0.1:9/v1", "ab" * 32
MODELS = [
    {"id": "tiny", "shortv": {"plan": "", "plan_digest": None}},
    {"id": "tiny@fast", "shortv": {"plan": "fast", "plan_digest": DIGEST}},
    {"id": "foreign"},
]
PICTURE = Image.effect_noise((8, 6), 90).convert("RGB")
GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "until": ["</s>"]}


def completion(body: Any) -> dict[str, Any]:
    """The answer of an endpoint of this project."""
    digest = {entry["id"]: (entry.get("shortv") or {}).get("plan_digest") for entry in MODELS}[body["model"]]
    message = {"role": "assistant", "content": answer_to(texts(body))}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43, "visual_tokens": 36},
        "shortv": {
            "plan": "",
            "plan_digest": digest,
            "queue_ms": 1.5,
            "vision_ms": 0.5,
            "prefill_ms": 2.5,
            "decode_ms": 3.5,
        },
    }


def texts(body: Any) -> str:
    contents = [message["content"] for message in body["messages"]]
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents]
    return "".join(part["text"] for content in parts for part in content if part["type"] == "text")


def reply(status: int, body: Any = None, headers: Mapping[str, str] = {}) -> httpx.Response:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/plain" if isinstance(body, str) else "application/json"
    return httpx.Response(status, content=content, headers={"Content-Type": kind, **headers})


Handler = Callable[[Any], httpx.Response]
"""From the JSON body of a completion request to the reply."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let an endpoint without a network reply as a handler says to all that follows."""
    client = openai.DefaultAsyncHttpxClient

    def answer(
        handler: Handler = lambda body: reply(200, completion(body)), models: Any = None, key: str = "none"
    ) -> None:
        def respond(request: httpx.Request) -> httpx.Response:
            if request.headers["Authorization"] != f"Bearer {key}":
                return reply(401, {"error": {"message": "no"}})
            if request.method == "GET":
                return models or reply(200, {"data": MODELS})
            return handler(json.loads(request.content))

        transport = httpx.MockTransport(respond)
        monkeypatch.setattr(openai, "DefaultAsyncHttpxClient", partial(client, transport=transport))

    answer()
    return answer


def served(**settings: Any) -> ShortVServe:
    """The model of lmms-eval before such an endpoint."""
    model = ShortVServe(**{"url": URL, "model": "tiny@fast", **settings})
    model.task_dict = {"pictures": {"test": list(range(40))}}
    return model


def messages(number: int) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": f"What is {number}?"}]
    return [{"role": "user", "content": content}]


def instance(at: int, kind: str = "generate_until", doc_to_messages: Any = messages, **more: Any) -> Instance:
    arguments = ("", doc_to_messages, {**GREEDY, **more}, at, "pictures", "test")
    return Instance(kind, arguments, idx=0, metadata={"task": "pictures", "doc_id": at, "repeats": 1})


def test_completions_come_in_order_with_their_token_counts(endpoint: Callable[..., None]) -> None:
    bodies: list[Any] = []
    endpoint(lambda body: bodies.append(body) or reply(200, completion(body)))  # type: ignore[func-returns-value]
    model = served(num_concurrent="4")
    found = model.generate_until([instance(at) for at in range(40)])
    # The same request twice is a repeat: drawn anew, and the same in another run.
    twice = instance(0, temperature=0.7, top_k=5, min_new_tokens=2)
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


def test_a_request_that_fails_ends_the_run_and_names_its_document(endpoint: Callable[..., None]) -> None:
    def broken(number: int) -> Any:
        raise KeyError("no such column")

    error = {"error": {"message": "image 0 cannot\nbe decoded", "type": "invalid_request_error"}}
    nothing = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    cut = {"choices": [{"message": {"content": "re"}, "finish_reason": "abort"}]}
    cases: dict[str, tuple[int, Any]] = {
        r"no answer \(invalid\): the endpoint says 400: image 0 cannot be decoded": (400, error),
        r"no answer \(internal\): the endpoint says 500": (500, "oh"),
        r"no answer \(internal\): .*NoneType as text": (200, nothing),
        r"finish_reason 'abort'": (200, cut),
        r"not in OpenAI's form \(KeyError: 'choices'\)": (200, {}),
        "answered under plan digest None, and the run began under abab": (
            200,
            completion({"model": "tiny", "messages": []}),
        ),
    }
    for message, (status, content) in cases.items():
        endpoint(lambda body: reply(status, content) if "is 3?" in texts(body) else reply(200, completion(body)))  # noqa: B023
        with pytest.raises(ShortVError, match="document 3 of task 'pictures' .*" + message):
            served().generate_until([instance(at) for at in range(6)])
    with pytest.raises(ShortVError, match=r"^document 3 of task 'pictures' gives no prompt: KeyError"):
        served().generate_until([instance(3, doc_to_messages=broken)])
    with pytest.raises(ShortVError, match="num_beams=4"):
        served().generate_until([instance(3, num_beams=4)])


def test_a_url_carries_no_likelihood(endpoint: Callable[..., None]) -> None:
    arguments = ("Is it?", " red", lambda number: None, 0, "pictures", "test")
    request = Instance("loglikelihood", arguments, idx=0, metadata={"task": "pictures", "doc_id": 0, "repeats": 1})
    with pytest.raises(ShortVError, match="a URL cannot carry likelihood"):
        served().loglikelihood([request])

    class Handle(ShortVServe):
        async def connect(self) -> Connection:
            return Connection(FakeClient(), "", None)

    model = Handle(app="shortv")
    model.task_dict = {"pictures": {"test": [0]}}
    wanted = likelihood_of("Is it?", " red")
    assert model.loglikelihood([request]) == [(wanted.log_probability, wanted.is_greedy)]


def test_settings_that_cannot_be_right_are_refused(tmp_path: Path, endpoint: Callable[..., None]) -> None:
    (tmp_path / "empty").write_text("\n")
    cases = {
        "url=http://x/v1,pretrained=y": "unknown setting 'pretrained'; the settings are url, app",
        "model=tiny": "give url=.* or app=NAME",
        f"url={URL},app=shortv": "one of them",
        "url=127.0.0.1:8000,model=a": "not the address of an endpoint",
        "url=http://me:secret@host/v1,model=a": "^the url contains a password(?!.*secret)",
        f"url={URL},model=tiny@fast,plan=slow": "name different plans",
        f"url={URL},model=tiny,num_concurrent=0": "num_concurrent is .0",
        f"url={URL},model=ti\0ny": "model is .*NUL",
        f"url={URL},model=tiny,api_key_file={tmp_path}/none": "cannot read api_key_file",
        f"url={URL},model=tiny,api_key_file={tmp_path}/empty": "is empty",
        f"url={URL},model=tiny@slow": r"no model 'tiny@slow'; set model= to one of foreign, tiny, tiny@fast",
        f"url={URL}": "needs the name of a model",
        f"url={URL},model=tiny@fast,plan_digest=0123456789abcdef": f"has digest {DIGEST}, not",
        f"url={URL},model=tiny,plan_digest={DIGEST}": "has digest None, not",
    }
    for text, message in cases.items():
        with pytest.raises(Refused, match=message) as caught:
            ShortVServe.create_from_arg_string(text, {"batch_size": 1, "device": None})
        assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_none_is_said(endpoint: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(model="foreign").plan_digest is None
    cases = {
        "does not accept the key": reply(401, {}),
        "answers 200 and does not list models": reply(200, "hello"),
        "does not say which plan": reply(200, {"data": [{"id": "tiny@fast"}]}),
    }
    for message, models in cases.items():
        endpoint(models=models)
        with pytest.raises(ShortVError, match=message):
            served()
    monkeypatch.undo()
    with pytest.raises(ShortVError, match=r"cannot be reached: .*is the endpoint running"):
        served()


def test_the_key_is_sent_and_the_response_cache_keys_on_the_plan(tmp_path: Path, endpoint: Callable[..., None]) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    (tmp_path / "key").write_text("sk-1\n")
    endpoint(key="sk-1")
    text = f"url={URL},model=tiny@fast,api_key_file={tmp_path}/key"
    ShortVServe.create_from_arg_string(text)
    cache = ResponseCache.create(str(tmp_path), model="shortv_serve", model_args=text)
    cache.close()
    assert DIGEST in cache.model_fingerprint and "sk-1" not in cache.model_fingerprint


def complete(**more: Any) -> Completion | Failure:
    parts = (("system", ("Be brief.",)), ("user", ("What", b"PNG")))
    messages = tuple(Message(role=role, parts=given) for role, given in parts)
    client = RemoteClient(open_endpoint(URL, None), "tiny")
    return asyncio.run(client.complete(Request(request_id="1", messages=messages, **more)))


def test_what_passes_is_tried_again_and_what_does_not_is_not(endpoint: Callable[..., None]) -> None:
    soon = {"Retry-After": "0.01"}
    failures = [429, 503, 502]

    def handler(body: Any) -> httpx.Response:
        if failures:
            return reply(failures.pop(0), {}, soon)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        return reply(200, completion(body))

    endpoint(handler)
    found = complete()
    assert isinstance(found, Completion) and not failures
    assert (found.queue_ms, found.prefill_ms, found.decode_ms, found.visual_tokens) == (1.5, 2.5, 3.5, 36)
    assert (found.preprocess_ms, found.vision_ms) == (0.0, 0.5)
    tried: list[int] = []
    for status, reason in ((500, Reason.INTERNAL), (504, Reason.DEADLINE), (404, Reason.UNKNOWN_PLAN)):

        def refuse(body: Any, status: int = status) -> httpx.Response:
            tried.append(status)
            return reply(status, {"error": {"message": "no\nmodel 'a'"}}, soon)

        endpoint(refuse)
        assert complete() == Failure(reason=reason, message=f"the endpoint says {status}: no model 'a'")
    assert tried == [500, 504, 404]


def test_trying_again_has_an_end(endpoint: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def full(body: Any) -> httpx.Response:
        tried.append(body)
        return reply(503, {"error": {"message": "the queue is full"}}, {"Retry-After": "0.001"})

    endpoint(full)
    assert complete() == Failure(reason=Reason.OVERLOADED, message="the endpoint says 503: the queue is full")
    assert len(tried) == 21
    monkeypatch.setattr(remote, "_SLACK_S", 0.0)
    endpoint(lambda body: reply(503, {}, {"Retry-After": "100"}))
    assert complete(timeout_s=0.2) == Failure(reason=Reason.DEADLINE, message="the endpoint gave no answer in time")


def test_lmms_eval_finds_the_model_and_scores_as_a_benchmark(tmp_path: Path, endpoint: Callable[..., None]) -> None:
    folder = write_tasks(tmp_path / "tasks")

    async def responses(benchmark: Benchmark) -> Any:
        connection = await connect_url(ServedSpec(url=URL, model="tiny", plan="fast"))
        instances = benchmark.instances(range(benchmark.num_docs))
        how = {"plan": connection.plan, "seed": benchmark.seed, "concurrency": 4}
        return await send_all(connection.client, instances, benchmark.documents, **how)

    arguments = f"url={URL},model=tiny,plan=fast,num_concurrent=4"
    found = simple_evaluation("shortv_serve", "rounds", folder, tmp_path, model_args=arguments)
    benchmark = Benchmark("rounds", include_path=folder)
    found_here = scored(benchmark, asyncio.run(responses(benchmark)))
    assert found_here.metrics and not any(sample.error for sample in found_here.samples)
    for row in found_here.metrics:
        assert found[f"{row.metric},{row.filter}"] == row.value
