"""What the endpoint answers, byte for byte where clients depend on it."""

import json
from typing import Any

import pytest
from starlette.applications import Starlette

from shortv.request import FULL_MODEL, Failure, Reason
from tests.workers.serving.endpoint_fakes import (
    MODEL,
    FakeReplicas,
    body,
    get,
    image_part,
    picture,
    post,
    problem,
    uri,
)


def test_an_answer_has_openais_form() -> None:
    replicas = FakeReplicas()
    response = post(body(image_part(uri(picture())), model=f"{MODEL}@last3", max_tokens=7), replicas)
    found = response.json()
    [question] = replicas.asked
    assert response.status_code == 200
    assert found.pop("created") > 0
    assert found == {
        "id": f"chatcmpl-{question.request_id}",
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
    assert question.plan == "last3" and question.timeout_s == 120
    assert question.sampling.max_tokens == 7 and question.sampling.temperature == 0
    assert question.messages[0].parts == (picture(), "What is this?")


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


def test_a_stream_says_who_then_what_then_why_it_ended() -> None:
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


def test_a_stream_without_a_piece_is_still_an_answer() -> None:
    chunks = events(post(body(stream=True), FakeReplicas(pieces=0)).text)
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
    assert not replicas.asked


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
    replicas = FakeReplicas(failure=Failure(reason=reason, message="why; what to do"), pieces=0)
    response = post(body(stream=stream), replicas, retry_after_s=3)
    assert problem(response, status)["message"] == "why; what to do"
    assert response.headers.get("retry-after") == ("3" if again else None)


@pytest.mark.parametrize(
    ("replicas", "said"),
    [
        (FakeReplicas(failure=Failure(reason=Reason.LOST, message="lost; ask again")), "lost; ask again"),
        (FakeReplicas(error=RuntimeError("What is this?")), "the service failed"),
        (FakeReplicas(ends=False), "broke off"),
    ],
)
def test_a_failure_in_mid_stream_is_its_last_event(replicas: FakeReplicas, said: str) -> None:
    response = post(body(stream=True), replicas)
    *chunks, last = events(response.text)
    assert response.status_code == 200 and len(chunks) == 3
    assert said in last["error"]["message"] and "What is this?" not in last["error"]["message"]
    assert replicas.closed == 1


def test_a_broken_service_says_nothing_of_its_inside() -> None:
    error = problem(post(body(), FakeReplicas(error=ValueError("secret"))), 500)
    assert "secret" not in json.dumps(error) and error["type"] == "server_error"


def test_unknown_paths_and_methods_have_the_form_of_errors() -> None:
    known = "POST /v1/chat/completions, GET /v1/models, GET /v1/models/{name}, GET /healthz"
    assert problem(get("/v1/nothing"), 404)["message"] == f"not found; there is {known}"
    assert problem(get("/v1/nothing", reports=Starlette()), 404)["message"].endswith(f"{known}, GET /reports")
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
