"""An endpoint in its own process, and a client for it on loopback that streams."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from shortv.bench.arrivals import REFUSED, SILENT, Outcome, Send
from shortv.errors import ShortVError

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
_PATIENCE_S = 60.0
_READY_S, _STOP_S = 180.0, 60.0


class RunningEndpoint(NamedTuple):
    """The URL of an endpoint, up to /v1, and its process."""

    url: str
    pid: int


@contextmanager
def running_endpoint(*arguments: str) -> Iterator[RunningEndpoint]:
    """Run `jobs/serve.py` on a free port of loopback; raises ShortVError when it does not start."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, str(JOB), "--port", str(port), *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + _READY_S
            while "is ready" not in (text := Path(log.name).read_text()):
                if process.poll() is not None or time.monotonic() > until:
                    raise ShortVError(f"the endpoint did not start: {(text.strip().splitlines() or ['no output'])[-1]}")
                time.sleep(0.2)
            yield RunningEndpoint(f"http://127.0.0.1:{port}/v1", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def bodies_of(questions: Iterable[tuple[bytes, str]], model: str, *, tokens: int) -> list[bytes]:
    """Return streaming chat requests for pairs of an image file and a prompt, each for so many tokens."""
    bodies = []
    for image, text in questions:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "shortv": {"min_tokens": tokens},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        bodies.append(json.dumps(body).encode())
    return bodies


@asynccontextmanager
async def streaming(url: str, bodies: Sequence[bytes]) -> AsyncIterator[Send]:
    """Yield what sends one of the bodies after the other, over as many connections as it takes."""
    timeout, connector = aiohttp.ClientTimeout(total=_PATIENCE_S), aiohttp.TCPConnector(limit=0)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def send(number: int) -> Outcome:
            try:
                started = time.perf_counter()
                async with session.post(f"{url}/chat/completions", data=bodies[number % len(bodies)]) as response:
                    if response.status == 200:
                        return await _read(response, started)
                    await response.read()
                    is_polite = response.status not in REFUSED or "retry-after" in response.headers
                    return Outcome(status=response.status, is_polite=is_polite)
            except (aiohttp.ClientError, TimeoutError):
                return Outcome(status=SILENT)

        yield send


async def _read(response: aiohttp.ClientResponse, started: float) -> Outcome:
    """Read a stream of server-sent events; one without its end counts as no response."""
    first_token_s: float | None = None
    last: dict[str, Any] = {}
    usage: dict[str, int] = {}
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        event: dict[str, Any] = json.loads(line[len(b"data: ") :])
        if first_token_s is None and any(choice["delta"].get("content") for choice in event["choices"]):
            first_token_s = time.perf_counter() - started
        last, usage = event.get("shortv", last), event.get("usage") or usage
    if not last:
        return Outcome(status=SILENT)
    return Outcome(
        status=200,
        first_token_s=first_token_s,
        prefill_ms=last.get("prefill_ms"),
        decode_ms=last.get("decode_ms"),
        tokens=usage.get("completion_tokens", 0),
    )
