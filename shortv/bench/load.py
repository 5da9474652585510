"""An endpoint in its own process, and a load client for it on loopback."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from shortv.errors import ShortVError

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
_PATIENCE_S = 60.0
_READY_S, _STOP_S = 180.0, 60.0


@dataclass(slots=True)
class Load:
    """Outcomes of the requests of one run."""

    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    """Requests without a response: lost connections, or none within a minute."""
    bare_refusals: int = 0
    """Refusals without Retry-After."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request with status 200."""
    lag: float = 0.0
    """Seconds by which the client sent a request late, at most."""
    seconds: float = 0.0
    client_cpu: float = 0.0

    @property
    def goodput(self) -> float:
        """Requests with status 200 per second."""
        return self.statuses[200] / self.seconds

    def figures(self) -> dict[str, float]:
        """What a table shows of the run; latencies are of the requests with status 200."""
        answered, refused = self.statuses[200], self.statuses[429] + self.statuses[503]
        sent = self.statuses.total() + self.silent
        late = sorted(self.latencies) or [float("nan")]
        return {
            "seconds": self.seconds,
            "sent": sent,
            "answered": answered,
            "refused": refused,
            "refused_without_retry_after": self.bare_refusals,
            "other": self.statuses.total() - answered - refused,
            "without_response": self.silent,
            "responses_per_s": self.goodput,
            "median_ms": 1e3 * statistics.median(late),
            "p99_ms": 1e3 * late[int(0.99 * len(late))],
            "client_cpu_ms_per_request": 1e3 * self.client_cpu / sent,
            "client_cpu_share": self.client_cpu / self.seconds,
            "client_lag_ms": 1e3 * self.lag,
        }


def bodies_of(questions: Iterable[tuple[bytes, str]], model: str) -> list[bytes]:
    """Request bodies for pairs of a PNG image and a prompt."""
    bodies = []
    for image, text in questions:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        asked = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        bodies.append(json.dumps(asked).encode())
    return bodies


async def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, seconds: float) -> Load:
    """Run `clients` clients that send a request as soon as they have a response; the goodput is the capacity."""
    queue = itertools.cycle(bodies)
    async with _running() as (load, session):
        until = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < until:
                await _send(session, url, next(queue), load)

        await asyncio.gather(*(client() for _ in range(clients)))
    return load


async def open_loop(url: str, bodies: Sequence[bytes], *, rate: float, seconds: float) -> Load:
    """Send `rate` requests per second regardless of the responses, and wait for the last one."""
    async with _running() as (load, session), asyncio.TaskGroup() as group:
        started = time.perf_counter()
        for number, body in zip(range(int(rate * seconds)), itertools.cycle(bodies), strict=False):
            ahead = started + number / rate - time.perf_counter()
            load.lag = max(load.lag, -ahead)
            await asyncio.sleep(max(ahead, 0))
            group.create_task(_send(session, url, body, load))
    return load


@asynccontextmanager
async def _running() -> AsyncIterator[tuple[Load, aiohttp.ClientSession]]:
    """A client, and the outcomes of what it sends with the time that all of it took."""
    load, started, cpu = Load(), time.perf_counter(), time.process_time()
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield load, session
    load.seconds, load.client_cpu = time.perf_counter() - started, time.process_time() - cpu


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, load: Load) -> None:
    started, headers = time.perf_counter(), {"content-type": "application/json"}
    try:
        async with session.post(f"{url}/chat/completions", data=body, headers=headers) as response:
            await response.read()
    except (aiohttp.ClientError, TimeoutError):
        load.silent += 1
        return
    load.statuses[response.status] += 1
    if response.status == 200:
        load.latencies.append(time.perf_counter() - started)
    elif response.status in (429, 503) and "retry-after" not in response.headers:
        load.bare_refusals += 1


@contextmanager
def running_endpoint(*arguments: str) -> Iterator[str]:
    """Run `jobs/serve.py` on a free port of loopback and yield its URL; raises ShortVError when it does not start."""
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
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
