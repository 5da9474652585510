"""What the endpoint replies, byte for byte where clients depend on it, and what happens to abandoned requests."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from reports.http import HttpError
from shortv.request import FULL_MODEL, Chunk, Failure, Reason, Request
from shortv.workers.serving.chat_reply import ChatReply, unless_gone
from shortv.workers.serving.chat_request import ChatCall
from tests.workers.serving.endpoint_fakes import (
    KEY,
    MODEL,
    PATH,
    FakeReplicas,
    background,
    body,
    client_of,
    get,
    head,
    image_part,
    picture,
    post,
    problem,
    served,
    until,
    uri,
)


def test_a_completion_has_openais_form() -> None:
    replicas = FakeReplicas()
    response = post(body(image_part(uri(picture())), model=f"{MODEL}@last3", max_tokens=7), replicas)
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
        | {"queue_ms": 0.5, "prefill_ms": 3.25, "decode_ms": 1.0},
    }
    assert request.plan == "last3" and request.timeout_s == 120
    assert request.sampling.max_tokens == 7 and request.sampling.temperature == 0
    assert request.messages[0].parts == (picture(), "What is this?")


def test_logprobs_come_with_their_bytes() -> None:
    found = post(body(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    first = found["content"][0]
    assert first["token"] == "The " and first["logprob"] == -0.25 and first["bytes"] == list(b"The ")
    assert first["top_logprobs"][1] == {"token": "Ä", "logprob": -9999.0, "bytes": list("Ä".encode())}
    assert post(body(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    data = [entry.removeprefix("data: ") for entry in text.split("\n\n")[:-1]]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_stream_has_the_role_then_the_text_then_the_reason_of_its_end() -> None:
    replicas = FakeReplicas()
    response = post(body(stream=True, stream_options={"include_usage": True}, logprobs=True), replicas)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "The ", "cat", None]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["token"] == "The "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[-1]["shortv"]["plan"] == "full" and chunks[-1]["shortv"]["prefill_ms"] == 3.25
    assert usage["choices"] == [] and usage["usage"]["visual_tokens"] == 8
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert replicas.closed == 1
    assert "usage" not in post(body(stream=True)).text


def test_a_stream_without_a_chunk_is_still_a_completion() -> None:
    chunks = events(post(body(stream=True), FakeReplicas(chunks=0)).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"


def test_models_are_the_full_one_and_each_plan() -> None:
    found = get("/v1/models").json()
    assert found["object"] == "list"
    assert [card["id"] for card in found["data"]] == [MODEL, f"{MODEL}@half", f"{MODEL}@last3"]
    assert [card["shortv"]["plan_digest"] for card in found["data"]] == ["d0", "d5", "d3"]
    assert get(f"/v1/models/{MODEL}@last3").json() == found["data"][2]
    assert get("/v1/models/org%2Ftiny%40last3").json()["id"] == f"{MODEL}@last3"
    error = problem(get("/v1/models/other"), 404)
    assert error["code"] == "model_not_found" and f"{MODEL}@half" in error["message"]


@pytest.mark.parametrize("name", ["other", f"{MODEL}@other", f"{MODEL}@", "@last3", "", FULL_MODEL])
def test_an_unknown_model_is_told_the_known_ones(name: str) -> None:
    replicas = FakeReplicas()
    error = problem(post(body(model=name), replicas), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert f"{MODEL}, {MODEL}@half, {MODEL}@last3" in error["message"]
    assert not replicas.requests


@pytest.mark.parametrize(
    ("reason", "status", "again"),
    [
        (Reason.INVALID, 400, False),
        (Reason.UNKNOWN_PLAN, 404, False),
        (Reason.OVERLOADED, 503, True),
        (Reason.DEADLINE, 504, False),
        (Reason.LOST, 503, True),
        (Reason.INTERNAL, 500, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_failure_has_its_status(reason: Reason, status: int, again: bool, stream: bool) -> None:
    replicas = FakeReplicas(failure=Failure(reason=reason, message="why; what to do"), chunks=0)
    response = post(body(stream=stream), replicas)
    assert problem(response, status)["message"] == "why; what to do"
    assert response.headers.get("retry-after") == ("1" if again else None)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (FakeReplicas(failure=Failure(reason=Reason.LOST, message="lost; ask again")), "lost; ask again"),
        (FakeReplicas(error=RuntimeError("What is this?")), "the service failed"),
        (FakeReplicas(ends=False), "ended before the completion was whole"),
    ],
)
def test_a_failure_in_mid_stream_is_its_last_event(replicas: FakeReplicas, message: str) -> None:
    response = post(body(stream=True), replicas)
    *chunks, last = events(response.text)
    assert response.status_code == 200 and len(chunks) == 3
    assert message in last["error"]["message"] and "What is this?" not in last["error"]["message"]
    assert replicas.closed == 1


def test_a_broken_service_says_nothing_of_its_inside() -> None:
    error = problem(post(body(), FakeReplicas(error=ValueError("secret"))), 500)
    assert "secret" not in json.dumps(error) and error["type"] == "server_error"


def test_unknown_paths_and_methods_have_the_form_of_errors() -> None:
    known = "POST /v1/chat/completions, GET /v1/models, HEAD /v1/models"
    assert known in problem(get("/v1/nothing"), 404)["message"]
    assert "GET /reports" in problem(get("/v1/nothing", reports=Starlette()), 404)["message"]
    response = get("/v1/chat/completions")
    problem(response, 405)
    assert response.headers["allow"] == "POST"
    problem(get("/docs"), 404)
    problem(get("/openapi.json"), 404)


def test_health_is_that_of_the_replicas() -> None:
    replicas = FakeReplicas()
    assert get("/healthz", replicas).json() == {"status": "ok"}
    replicas.is_healthy = False
    response = get("/healthz", replicas, address="10.0.0.1")
    problem(response, 503)
    assert response.headers["retry-after"] == "1"


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


def test_only_json_is_accepted() -> None:
    async def send() -> httpx.Response:
        async with client_of(FakeReplicas()) as client:
            return await client.post(PATH, content=b"{}", headers={"content-type": "text/plain"})

    assert "application/json" in problem(asyncio.run(send()), 415)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_surplus_requests_are_refused_and_slots_come_back(stream: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event())
        async with client_of(replicas, batch_size=1, max_queued=1) as client:
            sent = [asyncio.create_task(client.post(PATH, json=body(stream=stream))) for _ in range(6)]
            await until(lambda: sum(task.done() for task in sent) == 4)
            refused = [task.result() for task in sent if task.done()]
            assert problem(refused[0], 429)["type"] == "rate_limit_error" and len(replicas.requests) == 2
            assert {response.headers["retry-after"] for response in refused} == {"1"}
            # A full endpoint still lists its models.
            assert (await client.get("/v1/models")).status_code == 200
            replicas.gate.set()  # type: ignore[union-attr]
            assert {response.status_code for response in await asyncio.gather(*sent)} == {200, 429}
            for _ in range(4):
                problem(await client.post(PATH, json=body(seed="x")), 400)
            assert (await client.post(PATH, json=body())).status_code == 200

    asyncio.run(go())


def test_a_large_body_is_read_in_another_thread() -> None:
    replicas = FakeReplicas()
    assert post(body(image_part(uri(picture("BMP", (1000, 1000))))), replicas).status_code == 200
    assert replicas.requests[0].messages[0].parts[0] == picture("BMP", (1000, 1000))


def test_a_request_beyond_its_time_is_cancelled() -> None:
    async def go(**options: Any) -> tuple[httpx.Response, FakeReplicas]:
        replicas = FakeReplicas(gate=asyncio.Event(), **options)
        async with client_of(replicas, timeout=0.1) as client:
            return await client.post(PATH, json=body(stream=bool(options))), replicas

    response, replicas = asyncio.run(go())
    assert problem(response, 504)["code"] == "deadline"
    assert replicas.cancelled == 1 and replicas.requests[0].timeout_s == 0.1
    response, replicas = asyncio.run(go(gate_from=1))
    assert "deadline" in response.text.split("\n\n")[-2] and replicas.closed == 1


@pytest.mark.parametrize(("stream", "begun"), [(False, False), (True, False), (True, True)])
def test_a_client_that_disconnects_frees_its_slot(stream: bool, begun: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event(), gate_from=int(begun), chunks=3)
        async with served(replicas, batch_size=1, max_queued=1) as port:
            data = json.dumps(body(stream=stream)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(f"Content-Length: {len(data)}") + data)
            await until(lambda: bool(replicas.requests))
            if begun:
                await asyncio.wait_for(reader.readuntil(b"The "), 60)
            writer.close()
            await until(lambda: replicas.cancelled + replicas.closed == 1)

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_handler_that_is_cancelled_frees_its_slot(stream: bool) -> None:
    """Ray Serve cancels the task of a request instead of sending a disconnect."""

    async def go() -> None:
        replicas = FakeReplicas(gate=asyncio.Event())
        async with client_of(replicas) as client:
            async with background(client.post(PATH, json=body(stream=stream))):
                await until(lambda: bool(replicas.requests))
            assert replicas.cancelled + replicas.closed == 1

    asyncio.run(go())


def test_work_has_ended_when_the_waiting_ends() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def go() -> None:
        with pytest.raises(HttpError, match="went away"):
            await unless_gone(work(), receive)
        steps.append("returned")

    asyncio.run(go())
    assert steps == ["cleaned", "returned"]


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
        stream = ChatReply(call, request, SimpleNamespace(stream=lambda _: kept))
        with pytest.raises(HttpError, match="was not whole within"):
            await stream({"type": "http"}, receive, send)
        assert steps == ["http.response.start", "http.response.body", "closed"]

    asyncio.run(go())


def test_the_log_has_sizes_and_ids_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "Hildegard"
    post({"model": MODEL, "messages": [{"role": "user", "content": secret}]})
    post({"model": secret, "messages": [{"role": "user", "content": secret}]})
    post({"model": MODEL, "messages": [{"role": secret, "content": secret}], "seed": secret})
    post(body(image_part(uri(picture())), stop=[secret]), FakeReplicas(error=ValueError(secret)))
    post(f'{{"{secret}": '.encode())
    lines = [record.getMessage() for record in caplog.records if record.name == "shortv.http"]
    lines = [line for line in lines if "status=" in line]
    statuses = [200, 404, 400, 500, 400]
    assert [line.split()[1:4] for line in lines] == [["POST", PATH, f"status={status}"] for status in statuses]
    assert f"model={MODEL} received=" in lines[0] and "model=" not in lines[1]
    # The loggers of httpx and asyncio see requests too.
    assert secret not in caplog.text and "The cat" not in caplog.text
    assert "ValueError" in caplog.text and "endpoint_fakes.py" in caplog.text
