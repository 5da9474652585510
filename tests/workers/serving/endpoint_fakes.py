"""Replicas without a model, and clients of an endpoint in the same process."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from shortv.request import Chunk, Completion, Failure, Request, TokenLogprob
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.spec import EndpointSpec

MODEL = "org/tiny"
PLANS = {"": "d0", "last3": "d3", "half": "d5"}
PATH = "/v1/chat/completions"
URL = "http://localhost"


@dataclass(kw_only=True)
class FakeReplicas:
    """Completes with "The cat" or as its fields say; keeps the requests, and counts those that have ended.

    With an event as `gate`, requests wait for it, streams before the chunk of number `gate_from`.
    """

    failure: Failure | None = None
    error: Exception | None = None
    gate: asyncio.Event | None = None
    chunks: int = 2
    ends: bool = True
    gate_from: int = 0
    is_healthy: bool = True
    requests: list[Request] = field(default_factory=list)
    ended: int = 0

    async def complete(self, request: Request) -> Completion | Failure:
        async for found in self.stream(request):
            if not isinstance(found, Chunk):
                return found
        raise AssertionError("no completion")

    async def stream(self, request: Request) -> AsyncGenerator[Chunk | Completion | Failure]:
        self.requests.append(request)
        try:
            for number in range(self.chunks):
                if number >= self.gate_from and self.gate is not None:
                    await self.gate.wait()
                yield Chunk("The " if number == 0 else "cat", _logprobs(request)[number : number + 1])
            if self.error is not None:
                raise self.error
            if self.ends:
                yield self.failure or _completion(request)
        finally:
            self.ended += 1

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
        preprocess_ms=2.0,
        vision_ms=1.5,
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


def app_of(replicas: Any, *, key_digests: Any = (), reports: ASGIApp | None = None, **settings: Any) -> ASGIApp:
    return make_endpoint(EndpointSpec(model=MODEL, **settings), replicas, key_digests=key_digests, reports=reports)


def client_of(replicas: Any = None, address: str = "127.0.0.1", **settings: Any) -> TestClient:
    """An HTTP client at that address whose requests reach an endpoint without a socket."""
    return TestClient(app_of(replicas or FakeReplicas(), **settings), base_url=URL, client=(address, 4711))


def async_client_of(replicas: FakeReplicas, **settings: Any) -> httpx.AsyncClient:
    """The same for requests at a time."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app_of(replicas, **settings)), base_url=URL)


def post(data: Any, replicas: Any = None, **settings: Any) -> Any:
    """Send one request; `data` is JSON-like, or the bytes of a body."""
    raw = {"content": data, "headers": {"content-type": "application/json"}}
    return client_of(replicas, **settings).post(PATH, **(raw if isinstance(data, bytes) else {"json": data}))


def get(path: str, replicas: Any = None, *, headers: Any = None, **settings: Any) -> Any:
    return client_of(replicas, **settings).get(path, headers=headers)


def problem(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, checked for its form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something to become true; a hang fails."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
