"""The openai client, unmodified, against the endpoint."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest

from reports.access import key_digests_of
from shortv.request import Failure, Reason
from tests.workers.serving.endpoint_fakes import KEY, MODEL, FakeReplicas, app_of, image_part, picture, uri

MESSAGES: Any = [{"role": "user", "content": [image_part(uri(picture())), {"type": "text", "text": "What?"}]}]


def with_client(
    use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]],
    replicas: FakeReplicas | None = None,
    key: str = KEY,
    **settings: Any,
) -> Any:
    async def go() -> Any:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app_of(replicas or FakeReplicas(), **settings)))
        async with openai.AsyncOpenAI(
            api_key=key, base_url="http://localhost/v1", http_client=http, max_retries=0
        ) as one:
            return await use(one)

    return asyncio.run(go())


def test_it_lists_the_models() -> None:
    async def use(client: openai.AsyncOpenAI) -> list[str]:
        listed = [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(listed[-1])).id == listed[-1]
        return listed

    assert with_client(use) == [MODEL, f"{MODEL}@half", f"{MODEL}@last3"]


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}@last3"])
def test_it_asks_about_an_image(model: str) -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_completion_tokens=5,
            logprobs=True,
            top_logprobs=1,
            extra_body={"shortv": {"top_k": 3}},
        )

    replicas = FakeReplicas()
    found = with_client(use, replicas)
    assert found.choices[0].message.content == "The cat" and found.choices[0].finish_reason == "stop"
    assert found.choices[0].logprobs.content[1].top_logprobs[0].token == "The "
    assert found.usage.total_tokens == 14 and found.usage.visual_tokens == 8
    assert found.shortv["prefill_ms"] == 3.25
    assert found._request_id and found._request_id in found.id
    assert replicas.requests[0].sampling.top_k == 3


def test_it_streams_and_talks_on_with_what_it_got() -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        history = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "Sure?"}]
        await client.chat.completions.create(model=MODEL, messages=history)
        history[1] = whole.choices[0].message.model_dump()
        await client.chat.completions.create(model=MODEL, messages=history)
        return chunks

    replicas = FakeReplicas()
    chunks = with_client(use, replicas)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "The cat"
    assert chunks[-1].usage.prompt_tokens == 12
    assert [turn.role for turn in replicas.requests[-1].messages] == ["user", "assistant", "user"]


def test_errors_are_its_exceptions(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text(KEY)
    guarded = {"key_digests": key_digests_of(tmp_path / "keys")}

    async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
        return await client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})

    cases: list[tuple[type[openai.APIStatusError], FakeReplicas, dict[str, Any], dict[str, Any]]] = [
        (openai.NotFoundError, FakeReplicas(), {"model": "other"}, {}),
        (openai.BadRequestError, FakeReplicas(), {"temperature": 9}, {}),
        (openai.AuthenticationError, FakeReplicas(), {}, {"key": "wrong" * 5, **guarded}),
        (openai.InternalServerError, FakeReplicas(failure=Failure(reason=Reason.LOST, message="lost")), {}, {}),
    ]
    for kind, replicas, fields, settings in cases:
        with pytest.raises(kind) as caught:
            with_client(lambda client, fields=fields: ask(client, **fields), replicas, **settings)  # type: ignore[misc]
        assert isinstance(caught.value.body, dict) and caught.value.body["message"]
    assert with_client(ask, **guarded).choices


def test_a_stream_that_fails_is_an_exception() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        async for _ in stream:
            pass

    with pytest.raises(openai.APIError, match="lost; ask again"):
        with_client(use, FakeReplicas(failure=Failure(reason=Reason.LOST, message="lost; ask again")))
