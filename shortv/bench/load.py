"""MLPerf's two loads on an endpoint and on the way that campaigns use, under the full model and a plan."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray import serve
from ray.serve.handle import DeploymentHandle

from shortv.bench.arrivals import Load, Outcome, Send, closed_loop, offline, server
from shortv.bench.bundled import MODEL, plan_of, saved
from shortv.bench.endpoint import RunningEndpoint, bodies_of, running_endpoint, streaming
from shortv.bench.processes import peak_bytes
from shortv.bench.rows import GIB, Row
from shortv.bench.specs import LoadBench
from shortv.errors import ShortVError
from shortv.plan import Mode, Plan
from shortv.request import FULL_MODEL, Completion, Failure, Message, Request, Result, SamplingParams, Work
from shortv.spec import ModelSpec, WorkerRange
from shortv.sweep.planning import Control
from shortv.tiny.photos import make_photos_vqa
from shortv.workers.cluster import connected, free_nodes
from shortv.workers.models import ModelLoader, remote_model
from shortv.workers.serving.app import deploy, place_replicas, replica_app, undeploy
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.spec import BUNDLED_NAME

_REPLICA = "ServeReplica"
# The producers of a campaign send as many documents in a call.
_PACK = 16
_WARM_UP_S = 3.0
_OVERLOAD = 2.0
Question = tuple[bytes, str]
Opened = Callable[[str], AbstractAsyncContextManager[Send]]
"""Opens a way to send requests under the plan of that name."""


def bench(spec: LoadBench) -> Iterator[Row]:
    """Run the chosen parts on photographs, each on one replica of the bundled model."""
    frozen, bypassed = (plan_of(Control.LAST, 5, mode) for mode in (Mode.FREEZE_VISUAL, Mode.BYPASS_VISUAL))
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        make_photos_vqa(folder, n=64)
        table = pq.read_table(Path(folder, "photos_vqa.parquet"), columns=["image", "prompt"])
        questions = [(row["image"]["bytes"], row["prompt"]) for row in table.to_pylist()]
        if "campaign" in spec.parts or not spec.parts:
            yield from _campaign(spec, questions, [frozen, bypassed])
        if "endpoint" in spec.parts or not spec.parts:
            yield from _endpoint(spec, questions, frozen, Path(folder))
        if "overload" in spec.parts or not spec.parts:
            yield from _overload(spec, questions)


def _campaign(spec: LoadBench, questions: Sequence[Question], plans: Sequence[Plan]) -> Iterator[Row]:
    """Load replicas over the handle that campaigns use; the first rows are what a campaign's `speed` says of plans."""
    with _replicas(plans, most=max(spec.requests, *spec.concurrency)) as handle:
        works = [Work(request=_request(spec, one), plans=tuple(plan.name for plan in plans)) for one in questions[:16]]
        speeds = asyncio.run(ReplicaClient(handle).measure(works, seconds=spec.seconds))
        if isinstance(speeds, Failure):
            raise ShortVError(f"the plans could not be measured: {speeds.message}")
        full = next(one for one in speeds if one.plan == FULL_MODEL)
        for one in speeds:
            yield Row(
                case=f"one batch of {one.batch}, {_shown(one.plan)}",
                baseline_ms=full.prefill_ms,
                measured_ms=one.prefill_ms,
                ratio=one.prefill_ratio,
                figures={
                    "first_token_ms": one.ttft_ms,
                    "decode_ms_per_step": one.decode_ms_per_token,
                    "decode_ratio": _share(one.decode_ms_per_token, full.decode_ms_per_token),
                    "kv_cache_ratio": _share(one.kv_bytes, full.kv_bytes),
                    **({} if one.peak_bytes is None else {"peak_gib": one.peak_bytes / GIB}),
                },
            )

        @asynccontextmanager
        async def opened(plan: str) -> AsyncIterator[Send]:
            yield _Packing(ReplicaClient(handle, patient=True), spec, questions, plan).send

        yield from _loads("campaign", spec, ["", plans[0].name], opened)
        yield _memory("campaign", None)


def _endpoint(spec: LoadBench, questions: Sequence[Question], plan: Plan, folder: Path) -> Iterator[Row]:
    """Load an endpoint over HTTP; its queue is long enough for the Offline load."""
    [file] = saved([plan], folder).values()
    with running_endpoint("--plan", str(file), "--max-queued", str(max(spec.requests, *spec.concurrency))) as endpoint:

        def opened(name: str) -> AbstractAsyncContextManager[Send]:
            served = f"{BUNDLED_NAME}@{name}" if name else BUNDLED_NAME
            return streaming(endpoint.url, bodies_of(questions, served, tokens=spec.tokens))

        yield from _loads("endpoint", spec, ["", plan.name], opened)
        yield _memory("endpoint", endpoint)


def _overload(spec: LoadBench, questions: Sequence[Question]) -> Iterator[Row]:
    """Find an endpoint's capacity with 32 clients, then send twice as much."""
    bodies = bodies_of(questions, BUNDLED_NAME, tokens=spec.tokens)

    async def measure(url: str) -> tuple[Load, Load]:
        async with streaming(url, bodies) as send:
            await closed_loop(send, clients=32, seconds=_WARM_UP_S)
            capacity = await closed_loop(send, clients=32, seconds=spec.seconds)
            return capacity, await server(send, rate=_OVERLOAD * capacity.rate, seconds=spec.overload_seconds)

    with running_endpoint() as endpoint:
        capacity, overload = asyncio.run(measure(endpoint.url))
    yield Row(case="endpoint, 32 clients", figures=capacity.figures())
    shares = {"of_capacity": overload.rate / capacity.rate}
    yield Row(case="endpoint, Server at twice its capacity", figures=shares | overload.figures())


def _loads(way: str, spec: LoadBench, plans: Sequence[str], opened: Opened) -> Iterator[Row]:
    """Run each load under each plan in turn; the Server load of all plans has the same rate."""

    def row(load: str, plan: str, run: Callable[[Send], Awaitable[Load]]) -> tuple[Row, Load]:
        async def measure() -> Load:
            async with opened(plan) as send:
                return await run(send)

        found = asyncio.run(measure())
        return Row(case=f"{way}, {load}, {_shown(plan)}", figures=found.figures()), found

    def clients(count: int) -> Callable[[Send], Awaitable[Load]]:
        return lambda send: closed_loop(send, clients=count, seconds=spec.seconds)

    for plan in plans:
        row("warm-up", plan, lambda send: closed_loop(send, clients=16, seconds=_WARM_UP_S))
    rates = {}
    for plan in plans:
        shown, load = row("Offline", plan, lambda send: offline(send, requests=spec.requests))
        rates[plan] = load.rate
        yield shown
    for count in spec.concurrency:
        for plan in plans:
            yield row(f"{count} concurrent", plan, clients(count))[0]
    rate = spec.rate_share * rates[FULL_MODEL]
    for plan in plans:
        yield row(f"Server at {rate:.0f}/s", plan, lambda send: server(send, rate=rate, seconds=spec.seconds))[0]


class _Packing:
    """Sends what is submitted at the same time in calls of up to 16 documents, as the producers of a campaign do."""

    def __init__(self, client: ReplicaClient, spec: LoadBench, questions: Sequence[Question], plan: str) -> None:
        self._client, self._spec, self._questions, self._plan = client, spec, questions, plan
        self._waiting: list[tuple[int, asyncio.Future[Result]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def send(self, number: int) -> Outcome:
        """Complete one question."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((number, future))
        return _outcome(await future)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for at in range(0, len(waiting), _PACK):
            call = asyncio.ensure_future(self._complete(waiting[at : at + _PACK]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _complete(self, pack: Sequence[tuple[int, asyncio.Future[Result]]]) -> None:
        works = [
            Work(request=_request(self._spec, self._questions[number % len(self._questions)]), plans=(self._plan,))
            for number, _ in pack
        ]
        replies = await self._client.complete_all(works)
        for (_, future), found in zip(pack, replies.results, strict=True):
            future.set_result(found[self._plan])


def _request(spec: LoadBench, question: Question) -> Request:
    return Request(
        request_id=uuid.uuid4().hex,
        messages=(Message(role="user", parts=question),),
        sampling=SamplingParams(max_tokens=spec.tokens, min_tokens=spec.tokens),
    )


def _outcome(result: Result) -> Outcome:
    if not isinstance(result, Completion):
        return Outcome(status=503 if isinstance(result, Failure) and result.passing else 500)
    return Outcome(
        status=200,
        first_token_s=1e-3 * (result.preprocess_ms + result.queue_ms + result.vision_ms + result.prefill_ms),
        prefill_ms=result.prefill_ms,
        decode_ms=result.decode_ms,
        tokens=result.completion_tokens,
    )


@contextmanager
def _replicas(plans: Sequence[Plan], *, most: int) -> Iterator[DeploymentHandle[Any]]:
    """Deploy one replica of the bundled model that takes so many sequences at once."""
    with connected():
        placement = place_replicas(free_nodes(), replicas=WorkerRange(1, 1), gpus=1.0, device="auto")
        model = remote_model(ModelLoader(), ModelSpec(name=str(MODEL)))
        app = replica_app(model, plans, placement, engine=EngineSettings(max_queued=most))
        serve.start(proxy_location="Disabled")
        try:
            yield deploy(app, name="shortv-bench")
        finally:
            undeploy("shortv-bench")


def _memory(way: str, endpoint: RunningEndpoint | None) -> Row:
    peak = peak_bytes(_REPLICA, endpoint.pid if endpoint else None)
    return Row(case=f"{way}, replica's process", figures={"peak_memory_gib": peak / GIB})


def _share(value: float, whole: float) -> float:
    return value / whole if whole else float("nan")


def _shown(plan: str) -> str:
    return plan or "full"
