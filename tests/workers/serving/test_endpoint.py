"""What the endpoint replies, byte for byte where clients depend on it, and what happens to abandoned requests."""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn
from starlette.applications import Starlette

from reports.http import HttpError
from shortv.request import FULL_MODEL, Chunk, Failure, Reason, Request
from shortv.workers.serving.chat_reply import ChatReply
from shortv.workers.serving.chat_request import ChatCall
from tests.workers.serving.endpoint_fakes import (
    MODEL,
    PATH,
    URL,
    FakeReplicas,
    app_of,
    async_client_of,
    body,
    client_of,
    get,
    image_part,
    picture,
    post,
    problem,
    until,
    uri,
)

KEY = "a-key-of-24-characters-x"
LOST = Failure(reason=Reason.LOST, message="lost; ask again")


def test_a_completion_has_openais_form() -> None:
    replicas = FakeReplicas()
    # Large enough to be read in another thread.
    image = picture("BMP", (300, 300))
    response = post(body(image_part(uri(image)), model=f"{MODEL}@last3", max_tokens=7), replicas)
    found = response.json()
    [request] = replicas.requests
    assert response.status_code == 200
    assert found.pop("created") > 0
    assert found == {
        "id": f"chatcmpl-{request.request_id}",
        "object": "chat.completion",
        "model": f"{MODEL}@last3",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The cat", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14, "visual_tokens": 8},
        "shortv": {"plan": "last3", "plan_digest": "d3", "exit_layer": 5}
        | {"queue_ms": 0.5, "preprocess_ms": 2.0, "vision_ms": 1.5, "prefill_ms": 3.25, "decode_ms": 1.0},
    }
    assert request.plan == "last3" and request.timeout_s == 120
    assert request.sampling.max_tokens == 7 and request.sampling.temperature == 0
    assert request.messages[0].parts == (image, "What is this?")


def test_logprobs_come_with_their_bytes() -> None:
    found = post(body(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    first = found["content"][0]
    assert first["token"] == "The " and first["logprob"] == -0.25 and first["bytes"] == list(b"The ")
    assert first["top_logprobs"][1] == {"token": "Ä", "logprob": -9999.0, "bytes": list("Ä".encode())}
    assert post(body(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def events(response: Any) -> list[Any]:
    assert response.text.endswith("\n\n") and response.headers["content-type"].startswith("text/event-stream")
    data = [entry.removeprefix("data: ") for entry in response.text.split("\n\n")[:-1]]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_stream_has_the_role_then_the_text_then_the_reason_of_its_end() -> None:
    replicas = FakeReplicas()
    *chunks, usage, done = events(
        post(body(stream=True, stream_options={"include_usage": True}, logprobs=True), replicas)
    )
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "The ", "cat", None]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["token"] == "The "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[-1]["shortv"]["plan"] == "full" and chunks[-1]["shortv"]["prefill_ms"] == 3.25
    assert usage["choices"] == [] and usage["usage"]["visual_tokens"] == 8
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    # Without a chunk it is still a completion.
    opening, last, done = events(post(body(stream=True), FakeReplicas(chunks=0)))
    assert opening["choices"][0]["delta"]["role"] == "assistant" and last["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in last and "usage" not in opening


def openai_client(replicas: FakeReplicas) -> Any:
    client = client_of(replicas)
    return openai.OpenAI(api_key=KEY, base_url=f"{URL}/v1", http_client=client, max_retries=0).chat.completions


def test_openais_client_talks_on_with_what_it_got_and_raises_what_fails() -> None:
    replicas = FakeReplicas()
    client, history = openai_client(replicas), body()["messages"]
    whole = client.create(model=MODEL, messages=history)
    for message in (whole.choices[0].message, whole.choices[0].message.model_dump()):
        client.create(model=MODEL, messages=[*history, message, {"role": "user", "content": "Sure?"}])
        assert [turn.role for turn in replicas.requests[-1].messages] == ["user", "assistant", "user"]
    assert whole._request_id and whole._request_id in whole.id
    failing = openai_client(FakeReplicas(failure=LOST))
    with pytest.raises(openai.InternalServerError, match="lost; ask again"):
        failing.create(model=MODEL, messages=history)
    with pytest.raises(openai.APIError, match="lost; ask again"):
        list(failing.create(model=MODEL, messages=history, stream=True))


def test_models_are_the_full_one_and_each_plan() -> None:
    client = client_of()
    found = client.get("/v1/models").json()
    assert found["object"] == "list"
    assert [card["id"] for card in found["data"]] == [MODEL, f"{MODEL}@half", f"{MODEL}@last3"]
    assert [card["shortv"]["plan_digest"] for card in found["data"]] == ["d0", "d5", "d3"]
    assert client.get("/v1/models/org%2Ftiny%40last3").json() == found["data"][2]
    replicas = FakeReplicas()
    unknown = [post(body(model=name), replicas) for name in ("other", f"{MODEL}@other", f"{MODEL}@", FULL_MODEL)]
    for response in (get("/v1/models/other"), *unknown):
        error = problem(response, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert f"{MODEL}, {MODEL}@half, {MODEL}@last3" in error["message"]
    assert not replicas.requests


@pytest.mark.parametrize("stream", [False, True])
def test_each_failure_has_its_status(stream: bool) -> None:
    statuses = {"INVALID": 400, "UNKNOWN_PLAN": 404, "OVERLOADED": 503, "DEADLINE": 504, "LOST": 503, "INTERNAL": 500}
    assert set(statuses) == set(Reason.__members__)
    for name, status in statuses.items():
        replicas = FakeReplicas(failure=Failure(reason=Reason[name], message="why; what to do"), chunks=0)
        response = post(body(stream=stream), replicas)
        assert problem(response, status)["message"] == "why; what to do"
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (FakeReplicas(failure=LOST), "lost; ask again"),
        (FakeReplicas(error=RuntimeError("What is this?")), "the service failed"),
        (FakeReplicas(ends=False), "ended before the completion was whole"),
    ],
)
def test_a_failure_in_mid_stream_is_its_last_event(replicas: FakeReplicas, message: str) -> None:
    response = post(body(stream=True), replicas)
    *chunks, last = events(response)
    assert response.status_code == 200 and len(chunks) == 3
    assert message in last["error"]["message"] and "What is this?" not in last["error"]["message"]
    assert replicas.ended == 1


def test_unknown_paths_methods_and_types_have_the_form_of_errors() -> None:
    known = "POST /v1/chat/completions, GET /v1/models, HEAD /v1/models"
    assert known in problem(get("/v1/nothing"), 404)["message"]
    assert "GET /reports" in problem(get("/docs", reports=Starlette()), 404)["message"]
    response = get(PATH)
    problem(response, 405)
    assert response.headers["allow"] == "POST"
    response = client_of().post(PATH, content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in problem(response, 415)["message"]


def test_health_is_that_of_the_replicas() -> None:
    assert get("/healthz").json() == {"status": "ok"}
    response = get("/healthz", FakeReplicas(is_healthy=False), address="10.0.0.1")
    assert problem(response, 503)["code"] == "unavailable" and response.headers["retry-after"] == "1"


def test_one_guard_is_in_front_of_everything() -> None:
    digests = (hashlib.sha256(KEY.encode()).hexdigest(),)
    refused = get("/v1/models", key_digests=digests), get("/reports/", key_digests=digests, reports=Starlette())
    for response in refused:
        assert problem(response, 401)["code"] == "invalid_api_key"
    headers = {"authorization": f"Bearer {KEY}"}
    assert get("/v1/models", key_digests=digests, headers=headers, address="10.0.0.9").status_code == 200
    assert problem(get("/v1/models", address="10.0.0.9"), 403)["code"] == "loopback_only"
    assert get("/healthz", key_digests=digests).status_code == 200
    problem(get("/v1/models", headers={"x-long": "x" * 10**6}), 431)
    problem(post(json.dumps(body()).encode().ljust(2**20 + 1), max_body_mb=1), 413)


@pytest.mark.parametrize("stream", [False, True])
def test_surplus_requests_are_refused_and_slots_come_back(stream: bool) -> None:
    async def go() -> None:
        gate = asyncio.Event()
        replicas = FakeReplicas(gate=gate)
        async with async_client_of(replicas, batch_size=1, max_queued=1) as client:
            sent = [asyncio.create_task(client.post(PATH, json=body(stream=stream))) for _ in range(6)]
            await until(lambda: sum(task.done() for task in sent) == 4)
            refused = [task.result() for task in sent if task.done()]
            assert problem(refused[0], 429)["type"] == "rate_limit_error" and len(replicas.requests) == 2
            assert {response.headers["retry-after"] for response in refused} == {"1"}
            # A full endpoint still lists its models.
            assert (await client.get("/v1/models")).status_code == 200
            gate.set()
            assert {response.status_code for response in await asyncio.gather(*sent)} == {200, 429}
            for _ in range(4):
                problem(await client.post(PATH, json=body(seed="x")), 400)
            assert (await client.post(PATH, json=body())).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_beyond_its_time_is_cancelled(begun: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event(), gate_from=int(begun))
        async with async_client_of(replicas, timeout=0.1) as client:
            response = await client.post(PATH, json=body(stream=begun))
        error = events(response)[-1]["error"] if begun else problem(response, 504)
        assert error["code"] == "deadline"
        assert replicas.ended == 1 and replicas.requests[0].timeout_s == 0.1

    asyncio.run(go())


@contextlib.asynccontextmanager
async def served(replicas: FakeReplicas, **settings: Any) -> AsyncIterator[int]:
    """The endpoint behind a real socket; yields its port."""
    config = uvicorn.Config(app_of(replicas, **settings), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@pytest.mark.parametrize(("stream", "begun"), [(False, False), (True, False), (True, True)])
def test_a_client_that_disconnects_frees_its_slot(stream: bool, begun: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event(), gate_from=int(begun), chunks=3)
        async with served(replicas, batch_size=1, max_queued=1) as port:
            data = json.dumps(body(stream=stream)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await until(lambda: bool(replicas.requests))
            if begun:
                await asyncio.wait_for(reader.readuntil(b"The "), 60)
            writer.close()
            await until(lambda: replicas.ended == 1)

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_handler_that_is_cancelled_frees_its_slot(stream: bool) -> None:
    """Ray Serve cancels the task of a request instead of sending a disconnect."""

    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event())
        async with async_client_of(replicas) as client:
            sent = asyncio.create_task(client.post(PATH, json=body(stream=stream)))
            await until(lambda: bool(replicas.requests))
            sent.cancel()
            await asyncio.gather(sent, return_exceptions=True)
            # The clean-up of the work is over when its handler has ended.
            assert replicas.ended == 1

    asyncio.run(go())


def test_a_stream_that_nobody_reads_is_closed() -> None:
    """Its generator is suspended at a yield then, where cancelling the sender does not reach it."""
    steps: list[str] = []

    async def chunks() -> AsyncIterator[Chunk]:
        try:
            while True:
                yield Chunk("word ")
        finally:
            steps.append("closed")

    kept = chunks()

    async def send(message: Any) -> None:
        steps.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def go() -> None:
        request = Request(request_id="c", messages=(), timeout_s=0.1)
        call = ChatCall(MODEL, request, stream=True, include_usage=False)
        with pytest.raises(HttpError, match="was not whole within"):
            await ChatReply(call, request, SimpleNamespace(stream=lambda _: kept))({"type": "http"}, receive, send)
        assert steps == ["http.response.start", "http.response.body", "closed"]

    asyncio.run(go())


def test_the_log_and_errors_have_sizes_and_ids_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "Hildegard"
    post({"model": MODEL, "messages": [{"role": "user", "content": secret}]})
    post({"model": secret, "messages": [{"role": "user", "content": secret}]})
    post({"model": MODEL, "messages": [{"role": secret, "content": secret}], "seed": secret})
    error = problem(post(body(image_part(uri(picture())), stop=[secret]), FakeReplicas(error=ValueError(secret))), 500)
    assert secret not in json.dumps(error) and error["type"] == "server_error"
    post(f'{{"{secret}": '.encode())
    lines = [record.getMessage() for record in caplog.records if record.name == "shortv.http"]
    lines = [line for line in lines if "status=" in line]
    statuses = [200, 404, 400, 500, 400]
    assert [line.split()[1:4] for line in lines] == [["POST", PATH, f"status={status}"] for status in statuses]
    assert f"model={MODEL} received=" in lines[0] and "model=" not in lines[1]
    # The loggers of httpx and asyncio see requests too.
    assert secret not in caplog.text and "The cat" not in caplog.text
    assert "ValueError" in caplog.text and "endpoint_fakes.py" in caplog.text
