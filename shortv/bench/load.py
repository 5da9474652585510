"""An endpoint in its own process, and a load client for it on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from shortv.errors import ShortVError

_PATIENCE_S = 60.0
_READY_S, _STOP_S = 180.0, 60.0
_REFUSALS = (429, 503)


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
    def answered(self) -> int:
        """Requests with status 200."""
        return self.statuses[200]

    @property
    def refused(self) -> int:
        """Requests with status 429 or 503."""
        return sum(self.statuses[status] for status in _REFUSALS)

    @property
    def sent(self) -> int:
        """All requests."""
        return sum(self.statuses.values()) + self.silent

    @property
    def goodput(self) -> float:
        """Requests with status 200 per second."""
        return self.answered / self.seconds

    @property
    def median(self) -> float:
        """Median latency in seconds of the requests with status 200."""
        return statistics.median(self.latencies) if self.latencies else float("nan")

    @property
    def p99(self) -> float:
        """99th percentile of the same latencies."""
        return sorted(self.latencies)[int(0.99 * len(self.latencies))] if self.latencies else float("nan")


def bodies_of(prompts: Sequence[tuple[str, str]], model: str) -> list[bytes]:
    """Request bodies for pairs of an image's data URI and a prompt."""

    def body(uri: str, text: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}

    return [json.dumps(body(uri, text)).encode() for uri, text in prompts]


async def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, seconds: float) -> Load:
    """Run `clients` clients that send a request as soon as they have a response; the goodput is the capacity."""
    load, queue = Load(), itertools.cycle(bodies)
    started, cpu = time.perf_counter(), time.process_time()
    async with _session() as session:

        async def client() -> None:
            while time.perf_counter() - started < seconds:
                await _send(session, url, next(queue), load)

        await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds, load.client_cpu = time.perf_counter() - started, time.process_time() - cpu
    return load


async def open_loop(url: str, bodies: Sequence[bytes], *, rate: float, seconds: float) -> Load:
    """Send `rate` requests per second regardless of the responses, and wait for the last one."""
    load, queue = Load(), itertools.cycle(bodies)
    started, cpu = time.perf_counter(), time.process_time()
    async with _session() as session, asyncio.TaskGroup() as group:
        for at in _ticks(rate, seconds):
            ahead = started + at - time.perf_counter()
            load.lag = max(load.lag, -ahead)
            await asyncio.sleep(max(ahead, 0))
            group.create_task(_send(session, url, next(queue), load))
        load.seconds = time.perf_counter() - started
    load.client_cpu = time.process_time() - cpu
    return load


def _ticks(rate: float, seconds: float) -> Iterator[float]:
    return (number / rate for number in range(int(rate * seconds)))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_PATIENCE_S)
    )


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, load: Load) -> None:
    started = time.perf_counter()
    try:
        async with session.post(
            f"{url}/chat/completions", data=body, headers={"content-type": "application/json"}
        ) as response:
            await response.read()
    except (aiohttp.ClientError, TimeoutError):
        load.silent += 1
        return
    load.statuses[response.status] += 1
    if response.status == 200:
        load.latencies.append(time.perf_counter() - started)
    elif response.status in _REFUSALS and "retry-after" not in response.headers:
        load.bare_refusals += 1


@contextmanager
def running_endpoint(job: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Run `jobs/serve.py` on a free port of loopback and yield its URL; raises ShortVError when it does not start."""
    port = _free_port()
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(job), "--port", str(port), *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            _wait(process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[str], log: object) -> None:
    until = time.monotonic() + _READY_S
    while True:
        log.seek(0)  # type: ignore[attr-defined]  # a temporary file has no public type
        text = str(log.read())  # type: ignore[attr-defined]
        if "is ready" in text:
            return
        if process.poll() is not None or time.monotonic() > until:
            raise ShortVError(f"the endpoint did not start: {(text.strip().splitlines() or ['no output'])[-1]}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
