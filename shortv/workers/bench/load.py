"""A load client for the endpoint, on loopback alone: as fast as it answers, or faster."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_PATIENCE_S = 60.0
_REFUSALS = (429, 503)


@dataclass(slots=True)
class Load:
    """What became of the requests of one run."""

    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    """Requests without any answer: lost connections, or none within a minute."""
    bare_refusals: int = 0
    """Refusals without Retry-After."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of those that were answered."""
    lag: float = 0.0
    """The most by which the client itself was late."""
    seconds: float = 0.0
    client_cpu: float = 0.0

    @property
    def answered(self) -> int:
        """Requests with status 200."""
        return self.statuses[200]

    @property
    def refused(self) -> int:
        """Requests that were told to come back."""
        return sum(self.statuses[status] for status in _REFUSALS)

    @property
    def sent(self) -> int:
        """All requests."""
        return sum(self.statuses.values()) + self.silent

    @property
    def goodput(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds

    @property
    def median(self) -> float:
        """Median latency of an answer in seconds."""
        return statistics.median(self.latencies) if self.latencies else float("nan")

    @property
    def p99(self) -> float:
        """The latency that one answer in a hundred exceeds, in seconds."""
        return sorted(self.latencies)[int(0.99 * len(self.latencies))] if self.latencies else float("nan")


def bodies_of(questions: Sequence[tuple[str, str]], model: str) -> list[bytes]:
    """Request bodies for (data URI, question) pairs."""

    def body(uri: str, text: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}

    return [json.dumps(body(uri, text)).encode() for uri, text in questions]


async def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, seconds: float) -> Load:
    """So many clients, each asking again once it is answered: the goodput is the endpoint's capacity."""
    load, queue = Load(), itertools.cycle(bodies)
    started, cpu = time.perf_counter(), time.process_time()
    async with _session() as session:

        async def client() -> None:
            while time.perf_counter() - started < seconds:
                await _ask(session, url, next(queue), load)

        await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds, load.client_cpu = time.perf_counter() - started, time.process_time() - cpu
    return load


async def open_loop(url: str, bodies: Sequence[bytes], *, rate: float, seconds: float) -> Load:
    """So many requests per second, whatever comes back; waits for the last answer."""
    load, queue = Load(), itertools.cycle(bodies)
    started, cpu = time.perf_counter(), time.process_time()
    async with _session() as session, asyncio.TaskGroup() as group:
        for at in _ticks(rate, seconds):
            ahead = started + at - time.perf_counter()
            load.lag = max(load.lag, -ahead)
            await asyncio.sleep(max(ahead, 0))
            group.create_task(_ask(session, url, next(queue), load))
        load.seconds = time.perf_counter() - started
    load.client_cpu = time.process_time() - cpu
    return load


def _ticks(rate: float, seconds: float) -> Iterator[float]:
    return (number / rate for number in range(int(rate * seconds)))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_PATIENCE_S)
    )


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, load: Load) -> None:
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
