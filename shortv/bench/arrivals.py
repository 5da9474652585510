"""Loads: requests sent all at once, by a number of clients, or at random times, and what became of them.

Offline and Server are those of MLPerf Inference (https://arxiv.org/abs/1911.02549): all requests at once, measured by
throughput, and Poisson arrivals at a rate, measured by latencies.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

REFUSED = (429, 503)
SILENT = 0
"""The status of a request without a response: the connection was lost, or a minute was over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a request: an HTTP status, and for 200 the times, in milliseconds where not named otherwise."""

    status: int
    is_polite: bool = True
    """Whether a refusal says when to come again."""
    first_token_s: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    tokens: int = 0


Send = Callable[[int], Awaitable[Outcome]]
"""Sends the request of that number, whatever became of those before it."""


@dataclass(slots=True)
class Load:
    """The outcomes of a load."""

    outcomes: list[Outcome] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    """Seconds of each completed request."""
    lag: float = 0.0
    """Seconds by which the client sent a request late, at most."""
    seconds: float = 0.0
    client_cpu: float = 0.0

    @property
    def completed(self) -> list[Outcome]:
        """The requests with status 200."""
        return [one for one in self.outcomes if one.status == 200]

    @property
    def rate(self) -> float:
        """Completed requests per second."""
        return len(self.completed) / self.seconds

    def figures(self) -> dict[str, float]:
        """What a table shows of the load."""
        completed, sent = self.completed, len(self.outcomes)
        refused = [one for one in self.outcomes if one.status in REFUSED]
        silent = sum(one.status == SILENT for one in self.outcomes)
        figures = {
            "requests_per_s": self.rate,
            "sent": sent,
            "latency_p50_ms": 1e3 * _quantile(self.latencies, 0.5),
            "latency_p90_ms": 1e3 * _quantile(self.latencies, 0.9),
            "latency_p99_ms": 1e3 * _quantile(self.latencies, 0.99),
            **self._times(completed),
            "client_cpu_share": self.client_cpu / self.seconds,
        }
        troubles = {
            "refused": len(refused),
            "refused_without_retry_after": sum(not one.is_polite for one in refused),
            "other": sent - len(completed) - len(refused) - silent,
            "without_response": silent,
            "client_lag_ms": 1e3 * self.lag,
        }
        return figures | {name: value for name, value in troubles.items() if value}

    @staticmethod
    def _times(completed: Sequence[Outcome]) -> dict[str, float]:
        first = [one.first_token_s for one in completed if one.first_token_s is not None]
        prefill = [one.prefill_ms for one in completed if one.prefill_ms is not None]
        decode = [one.decode_ms / (one.tokens - 1) for one in completed if one.decode_ms is not None and one.tokens > 1]
        return {
            "first_token_p50_ms": 1e3 * _quantile(first, 0.5),
            "first_token_p99_ms": 1e3 * _quantile(first, 0.99),
            "prefill_ms": statistics.median(prefill) if prefill else float("nan"),
            "decode_ms_per_token": statistics.median(decode) if decode else float("nan"),
        }


async def offline(send: Send, *, requests: int) -> Load:
    """Send so many requests at once."""
    async with _load() as load:
        await asyncio.gather(*(_sent(send, number, load) for number in range(requests)))
    return load


async def closed_loop(send: Send, *, clients: int, seconds: float) -> Load:
    """Run `clients` clients for some time, each of which sends a request when it has the response to the one before."""
    numbers = itertools.count()
    async with _load() as load:
        until = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < until:
                await _sent(send, next(numbers), load)

        await asyncio.gather(*(client() for _ in range(clients)))
    return load


async def server(send: Send, *, rate: float, seconds: float, seed: int = 0) -> Load:
    """Send requests as a Poisson process, regardless of the responses, and wait for the last one."""
    rng, due = random.Random(seed), 0.0
    async with _load() as load, asyncio.TaskGroup() as group:
        started = time.perf_counter()
        for number in itertools.count():
            due += rng.expovariate(rate)
            if due > seconds:
                break
            ahead = started + due - time.perf_counter()
            load.lag = max(load.lag, -ahead)
            await asyncio.sleep(max(ahead, 0))
            group.create_task(_sent(send, number, load))
    return load


@asynccontextmanager
async def _load() -> AsyncIterator[Load]:
    load, started, cpu = Load(), time.perf_counter(), time.process_time()
    yield load
    load.seconds, load.client_cpu = time.perf_counter() - started, time.process_time() - cpu


async def _sent(send: Send, number: int, load: Load) -> None:
    started = time.perf_counter()
    outcome = await send(number)
    load.outcomes.append(outcome)
    if outcome.status == 200:
        load.latencies.append(time.perf_counter() - started)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")
