"""Replicas without a model, and clients of an endpoint in the same process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import httpx
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from shortv.request import Chunk, Completion, Failure, Request, TokenLogprob
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.spec import EndpointSpec

MODEL = "org/tiny"
PLANS = {"": "d0", "last3": "d3", "half": "d5"}
PATH = "/v1/chat/completions"
KEY = "a-key-of-24-characters-x"


class FakeReplicas:
    """Completes with "The cat" or as its fields say; keeps the requests, and counts those that were cancelled.

    With an event as `gate`, requests wait for it, streams before the chunk of number `gate_from`.
    """

    def __init__(
        self,
        *,
        failure: Failure | None = None,
        error: Exception | None = None,
        gate: asyncio.Event | None = None,
        chunks: int = 2,
        ends: bool = True,
        gate_from: int = 0,
    ) -> None:
        self.failure, self.error, self.gate, self.chunks = failure, error, gate, chunks
        self.ends, self.gate_from = ends, gate_from
        self.is_healthy = True
        self.requests: list[Request] = []
        self.cancelled = 0
        self.closed = 0

    async def complete(self, request: Request) -> Completion | Failure:
        self.requests.append(request)
        try:
            await self._wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return self.failure or _completion(request)

    async def _wait(self) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        self.requests.append(request)
        try:
            for number in range(self.chunks):
                if number >= self.gate_from:
                    await self._wait()
                yield Chunk("The " if number == 0 else "cat", _logprobs(request)[number : number + 1])
            if self.error is not None:
                raise self.error
            if self.ends:
                yield self.failure or _completion(request)
        finally:
            self.closed += 1

    async def plans(self, *, fresh: bool = False) -> Mapping[str, str]:
        if fresh and not self.is_healthy:
            raise TimeoutError
        return PLANS


def _completion(request: Request) -> Completion:
    return Completion(
        text="The cat",
        finish_reason="stop",
        prompt_tokens=12,
        visual_tokens=8,
        completion_tokens=2,
        plan_digest=PLANS[request.plan],
        queue_ms=0.5,
        prefill_ms=3.25,
        decode_ms=1.0,
        exit_layer=5,
        logprobs=_logprobs(request),
    )


def _logprobs(request: Request) -> tuple[TokenLogprob, ...]:
    if request.sampling.top_logprobs is None:
        return ()
    top = (("The ", -0.25), ("Ä", float("-inf")))[: request.sampling.top_logprobs]
    return (TokenLogprob("The ", -0.25, top), TokenLogprob("cat", -1.0, top))


def picture(form: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    """An image file with structure, so that JPEG has something to encode."""
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(data, form)
    return data.getvalue()


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A small request; parts come before its text."""
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def app_of(
    replicas: Any, *, key_digests: Sequence[str] = (), reports: ASGIApp | None = None, **settings: Any
) -> ASGIApp:
    spec = EndpointSpec(model=MODEL, **settings)
    return make_endpoint(spec, replicas, key_digests=key_digests, reports=reports)


def client_of(replicas: FakeReplicas, address: str = "127.0.0.1", **settings: Any) -> httpx.AsyncClient:
    """An HTTP client whose requests reach an endpoint without a socket."""
    transport = httpx.ASGITransport(app_of(replicas, **settings), client=(address, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def post(data: Any, replicas: FakeReplicas | None = None, **settings: Any) -> httpx.Response:
    """Send one request; `data` is JSON-like, or the bytes of a body."""

    async def send() -> httpx.Response:
        async with client_of(replicas or FakeReplicas(), **settings) as client:
            raw = {"content": data, "headers": {"content-type": "application/json"}}
            return await client.post(PATH, **(raw if isinstance(data, bytes) else {"json": data}))

    return asyncio.run(send())


def get(path: str, replicas: FakeReplicas | None = None, *, headers: Any = None, **settings: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client_of(replicas or FakeReplicas(), **settings) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, checked for its form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def served(replicas: FakeReplicas, **settings: Any) -> AsyncIterator[int]:
    """The endpoint behind a real socket; yields its port."""
    server = uvicorn.Server(
        uvicorn.Config(app_of(replicas, **settings), port=0, log_config=None, timeout_graceful_shutdown=1)
    )
    async with background(server.serve()):
        await until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await asyncio.sleep(0.15)


def head(length: str, kind: str = "application/json") -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n".encode()
