"""Clients that go away give their places back."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shortv.request import Chunk
from shortv.workers.serving.event_stream import EventStream
from shortv.workers.serving.openai_answers import AnswerForm
from shortv.workers.serving.rejection import Rejected
from shortv.workers.serving.settings import EndpointSettings
from shortv.workers.serving.waiting import unless_gone
from tests.workers.serving.endpoint_fakes import PATH, FakeReplicas, background, body, client_of, head, served, until


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_away_frees_its_place(stream: bool, begun: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(seconds=0.05 if stream and begun else 30, pieces=1000)
        async with served(replicas, max_in_flight=1) as port:
            data = json.dumps(body(stream=stream)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(f"Content-Length: {len(data)}") + data)
            await until(lambda: bool(replicas.asked))
            if stream and begun:
                await reader.readuntil(b"cat")
            writer.close()
            await until(lambda: replicas.cancelled + replicas.closed == 1)
            replicas.seconds, replicas.pieces = 0, 2
            async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as client:
                assert (await client.post(PATH, json=body(stream=stream))).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_handler_that_is_cancelled_frees_its_place(stream: bool) -> None:
    """Ray Serve cancels the request's task instead of sending a disconnect."""

    async def go() -> None:
        replicas = FakeReplicas(seconds=30)
        async with client_of(replicas, max_in_flight=1) as client:
            async with background(client.post(PATH, json=body(stream=stream))):
                await until(lambda: bool(replicas.asked))
            assert replicas.cancelled + replicas.closed == 1
            replicas.seconds = 0
            assert (await client.post(PATH, json=body())).status_code == 200

    asyncio.run(go())


def test_work_has_ended_when_the_waiting_ends() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.01)
            steps.append("cleaned")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def go() -> None:
        with pytest.raises(Exception, match="went away"):
            await unless_gone(work(), receive)
        steps.append("returned")

    asyncio.run(go())
    assert steps == ["cleaned", "returned"]


def test_a_stream_nobody_reads_is_closed() -> None:
    """It stands at a yield then, where cancelling the sender does not reach it."""
    steps: list[str] = []

    async def pieces() -> AsyncIterator[Chunk]:
        try:
            while True:
                yield Chunk("word ")
        finally:
            steps.append("closed")

    kept = pieces()

    async def send(message: Any) -> None:
        steps.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.sleep(30)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def go() -> None:
        form = AnswerForm(completion_id="c", created=1, model="m", plan="full", with_logprobs=False)
        stream = EventStream(lambda: kept, form, EndpointSettings(timeout_s=0.1), include_usage=False)
        with pytest.raises(Rejected, match="not complete within"):
            await stream({"type": "http"}, receive, send)
        assert steps == ["http.response.start", "http.response.body", "closed"]

    asyncio.run(go())
