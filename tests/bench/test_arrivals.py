"""Loads send what their names say, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest

from shortv.bench.arrivals import SILENT, Load, Outcome, closed_loop, offline, server

GUARD_S = 60.0


def run(load: Callable[[], Awaitable[Load]]) -> Load:
    async def guarded() -> Load:
        async with asyncio.timeout(GUARD_S):
            return await load()

    return asyncio.run(guarded())


def test_offline_sends_every_request_before_it_waits_for_one() -> None:
    sent: list[int] = []

    async def send(number: int) -> Outcome:
        sent.append(number)
        while len(sent) < 20:
            await asyncio.sleep(0)
        return Outcome(status=200, first_token_s=0.5, prefill_ms=7.0, decode_ms=30.0, tokens=4)

    load = run(lambda: offline(send, requests=20))
    assert sent == list(range(20)) and len(load.completed) == 20
    figures = load.figures()
    assert (figures["first_token_p99_ms"], figures["prefill_ms"], figures["decode_ms_per_token"]) == (500, 7, 10)


def test_a_closed_loop_never_has_more_requests_than_clients() -> None:
    running, most = 0, 0

    async def send(_: int) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Outcome(status=200)

    load = run(lambda: closed_loop(send, clients=3, seconds=0.05))
    assert most == 3 and len(load.outcomes) >= 3


def test_server_draws_arrivals_by_seed_and_waits_for_no_response() -> None:
    async def sent_by(seed: int) -> int:
        waiting = asyncio.Event()
        count = 0

        async def send(_: int) -> Outcome:
            nonlocal count
            count += 1
            await waiting.wait()
            return Outcome(status=200)

        load = asyncio.create_task(server(send, rate=2000, seconds=0.2, seed=seed))
        while not count:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.3, waiting.set)
        assert len((await load).outcomes) == count
        return count

    first, again, other = (asyncio.run(sent_by(seed)) for seed in (0, 0, 1))
    # About 400 arrivals, five standard deviations either way.
    assert first == again != other and abs(first - 400) < 100


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (Outcome(status=429, is_polite=False), "refused_without_retry_after"),
        (Outcome(status=503), "refused"),
        (Outcome(status=500), "other"),
        (Outcome(status=SILENT), "without_response"),
    ],
)
def test_what_is_not_completed_is_counted_and_has_no_latency(outcome: Outcome, name: str) -> None:
    async def send(_: int) -> Outcome:
        return outcome

    figures = run(lambda: offline(send, requests=4)).figures()
    assert figures[name] == 4 and figures["requests_per_s"] == 0 and math.isnan(figures["latency_p50_ms"])
