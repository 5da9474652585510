"""The actor that turns documents into requests and answers into rows: one or two on each node, without a model.

It loads a task once, decodes each document's images once, sends a few documents with all of their plans in one call to
a replica, and scores the answers by the task's own functions. A unit comes back as one Parquet file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any, Final

import pyarrow as pa
from pyarrow import parquet as pq

from reports.schemas import table_of
from shortv.errors import SampleError, ShortVError
from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import Response, WorkClient, respond_under_plans
from shortv.evals.judging import Judge
from shortv.evals.preview import Preview, preview
from shortv.evals.scoring import ScoredSample, stored_responses
from shortv.request import EngineClock, Failure, PlanSpeed, Reason, Replies, Work
from shortv.workers.campaign.units import TaskSource, Unit, UnitCell
from shortv.workers.shipping import ShippedFolder

REQUEST_SECONDS: Final = 600.0
"""How long one request may take, including the time until a lost replica is back."""
_SAMPLE: Final = tuple(field.name for field in fields(ScoredSample))
MEASURED_DOCUMENTS: Final = 16
"""Documents on which the speed of plans is measured."""


_ROTATED: Final = 16
"""Documents after which another plan is the first; as many as a batch has, as a rule."""
# What scoring says of an answer.
_SCORED: Final = ("prediction", "target", "kind", "scores", "error", "responses", "values")


class ProducerLost(Exception):
    """The producer died with the unit; another one may finish it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """A finished unit: its rows of the table `answers` as a Parquet file, and what the driver counts."""

    part: bytes
    rows: int
    errors: Mapping[str, int] = field(default_factory=dict)
    """Rows with an error, by cell."""
    clocks: Mapping[str, EngineClock] = field(default_factory=dict)
    """The last clock of each replica that answered."""
    judged: bytes | None = None
    """New replies of an LLM judge, rows of the table `judge` as a Parquet file; None where there are none."""


def result_of(
    rows: Sequence[Mapping[str, Any]],
    clocks: Mapping[str, EngineClock] | None = None,
    judged: Sequence[Mapping[str, Any]] = (),
) -> UnitResult:
    """Return rows of the tables `answers` and `judge` as the result of a unit."""
    errors: dict[str, int] = {}
    for row in rows:
        if row["error"] is not None:
            errors[row["cell"]] = errors.get(row["cell"], 0) + 1
    replies = parquet_of("judge", judged) if judged else None
    return UnitResult(
        part=parquet_of("answers", rows), rows=len(rows), errors=errors, clocks=clocks or {}, judged=replies
    )


def parquet_of(name: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows of a table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(name, rows), sink, compression="zstd")
    return bytes(sink.getvalue())


def judge_rows(task: str, judge: Judge) -> list[dict[str, Any]]:
    """Return what a judge replied as rows of the table `judge`."""
    return [{"digest": digest, "task": task, **reply._asdict()} for digest, reply in judge.new.items()]


def answer_row(cell: UnitCell, digest: int, sample: ScoredSample) -> dict[str, Any]:
    """Return a row of the table `answers`."""
    # A sample that failed has no scores; NaN is stored as null.
    scores = sample.scores if sample.error is None else {}
    pairs = [{"metric": metric, "value": value if value == value else None} for metric, value in scores.items()]
    names = {"cell": cell.cell, "model": cell.model, "plan": cell.plan, "task": cell.task}
    values = {name: getattr(sample, name) for name in _SAMPLE}
    return {**values, **names, "doc_digest": digest, "scores": pairs}


def lost_rows(unit: Unit, names: Callable[[int], str], message: str) -> UnitResult:
    """Return a unit whose documents have no answers, because whatever works on them dies."""
    rows = []
    for doc, digest in zip(unit.docs, unit.digests, strict=True):
        sample = ScoredSample(doc=doc, sample_id=names(doc), prediction=None, target=None, error=message)
        rows += [answer_row(cell, digest, sample) for cell in unit.cells]
    return result_of(rows)


class Window:
    """Bounds the documents that are on their way to replicas, across the units of a producer."""

    def __init__(self) -> None:
        self.size = 1
        self._taken = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def places(self, count: int) -> AsyncIterator[None]:
        """Take places for the block, waiting for them; however many are wanted, an empty window has them."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._taken or self._taken + count <= self.size)
            self._taken += count
        try:
            yield
        finally:
            async with self._changed:
                self._taken -= count
                self._changed.notify_all()


class Producer:
    """Runs units; many at a time, so that replicas have the next documents while rows of the last ones are made."""

    def __init__(self, client_of: Callable[[str], WorkClient]) -> None:
        """Take what connects to an application of replicas, by its name."""
        self._client_of = client_of
        self._clients: dict[str, WorkClient] = {}
        self._benchmarks: dict[TaskSource, Benchmark] = {}
        # One thread: tasks are third-party code that was written to be called by one.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shortv-task")
        self._window = Window()
        self._began: float | None = None

    async def prepare(self, task: TaskSource) -> None:
        """Load a task. Raises ShortVError when it cannot be loaded here, or differs from the driver's."""
        await self._in_pool(self._benchmark, task)

    async def run(self, unit: Unit, *, window: int, pack: int) -> UnitResult:
        """Answer and score the documents of a unit under its plans.

        Args:
            window: the most documents that all units of this producer may have on their way.
            pack: documents of a call, at most.

        Raises:
            ShortVError: the task cannot be loaded here, or its documents are not those of the driver.
        """
        self._window.size = window
        benchmark = await self._in_pool(self._benchmark, unit.task)
        await self._in_pool(_check_documents, unit, benchmark)
        judge = Judge(unit.judged)
        if unit.unscored:
            scored: UnitResult = await self._in_pool(_score_again, unit, benchmark, judge)
            return scored
        packs = [slice(start, start + pack) for start in range(0, len(unit.docs), pack)]
        clocks: dict[str, EngineClock] = {}
        tasks = [asyncio.create_task(self._run_pack(unit, benchmark, judge, some, clocks)) for some in packs]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        rows = [row for rows in found for row in rows]
        result: UnitResult = await self._in_pool(result_of, rows, clocks, judge_rows(unit.task.name, judge))
        return result

    async def _run_pack(
        self, unit: Unit, benchmark: Benchmark, judge: Judge, some: slice, clocks: dict[str, EngineClock]
    ) -> list[dict[str, Any]]:
        docs = unit.docs[some]
        async with self._window.places(len(docs)):
            instances = await self._in_pool(benchmark.instances, docs)
            responses = await respond_under_plans(
                _Timed(self._client(unit.app), clocks),
                instances,
                benchmark.documents,
                plans=_rotated([cell.served for cell in unit.cells], docs[0] // _ROTATED),
                seed=benchmark.seed,
                timeout_s=REQUEST_SECONDS,
                pool=self._pool,
            )
        rows: list[dict[str, Any]] = await self._in_pool(_rows, unit, benchmark, judge, some, responses)
        return rows

    async def measure(self, unit: Unit, *, seconds: float) -> list[PlanSpeed]:
        """Have one replica measure the speed of a unit's plans on its documents, for about so many seconds."""
        benchmark = await self._in_pool(self._benchmark, unit.task)
        plans = tuple(cell.served for cell in unit.cells)
        works = await self._in_pool(_first_works, benchmark, unit.docs, plans)
        client: Any = self._client(unit.app)
        found = await client.measure(works, seconds=seconds) if works else ()
        if isinstance(found, Failure):
            raise ShortVError(found.message)
        return list(found)

    async def pictures(self, task: TaskSource, docs: Sequence[int]) -> list[dict[str, Any]]:
        """Return the question and a small picture of documents, as rows of the table `thumbnails`."""
        benchmark = await self._in_pool(self._benchmark, task)
        rows: list[dict[str, Any]] = await self._in_pool(_pictures, benchmark, docs)
        return rows

    def _client(self, app: str) -> WorkClient:
        if app not in self._clients:
            self._clients[app] = self._client_of(app)
        return self._clients[app]

    def _benchmark(self, task: TaskSource) -> Benchmark:
        if task not in self._benchmarks:
            found = self.load(task)
            if found.digest != task.digest:
                problem = f"task {task.name!r} on this node is not the driver's: its configuration or code differs"
                raise ShortVError(f"{problem}; install the same release of the task on every node")
            found.instances(())
            self._benchmarks[task] = found
        return self._benchmarks[task]

    def load(self, task: TaskSource) -> Benchmark:
        """Load a task. Raises ShortVError when it cannot be loaded here."""
        folders = [one.local() if isinstance(one, ShippedFolder) else one for one in task.folders]
        return Benchmark(task.name, include_path=folders, **task.settings)

    async def stuck_s(self) -> float:
        """Return for how many seconds the task's thread has worked on what it is doing; 0 when it waits."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def _in_pool(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, function, *arguments)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._began = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._began = None


@dataclass(frozen=True, slots=True)
class _Timed:
    """A client that keeps the last clock of each replica."""

    client: WorkClient
    clocks: dict[str, EngineClock]

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        if not works:
            return Replies(results=())
        replies = await self.client.complete_all(works)
        if replies.clock is not None:
            self.clocks[replies.clock.replica] = replies.clock
        return replies


def _rotated(plans: Sequence[str], turn: int) -> list[str]:
    """Return plans so that each of them is first for as many documents: the first ones wait for preprocessing."""
    start = turn % len(plans)
    return [*plans[start:], *plans[:start]]


def _check_documents(unit: Unit, benchmark: Benchmark) -> None:
    for doc, wanted in zip(unit.docs, unit.digests, strict=True):
        if doc >= benchmark.num_docs or benchmark.digest_of(doc) != wanted:
            problem = f"document {doc} of task {benchmark.name!r} on this node is not the driver's"
            raise ShortVError(f"{problem}; make the same version of the data set available on every node")


def _rows(
    unit: Unit, benchmark: Benchmark, judge: Judge, some: slice, responses: Mapping[str, list[Response]]
) -> list[dict[str, Any]]:
    """Score the answers under each plan and return their rows."""
    docs = unit.docs[some]
    digests = dict(zip(docs, unit.digests[some], strict=True))
    rows = []
    for cell in unit.cells:
        checked = [_checked(cell, response) for response in responses[cell.served]]
        scored = benchmark.score(docs, checked, judge=judge)
        rows += [answer_row(cell, digests[sample.doc], sample) for sample in scored]
        for doc in docs:
            if (reason := benchmark.unusable.get(doc)) is not None:
                sample = ScoredSample(
                    **benchmark.label(doc)._asdict(), doc=doc, prediction=None, error=f"answer: {reason}"
                )
                rows.append(answer_row(cell, digests[doc], sample))
    return rows


def _score_again(unit: Unit, benchmark: Benchmark, judge: Judge) -> UnitResult:
    """Score stored answers; what they cost stays as it was."""
    rows = []
    for cell in unit.cells:
        own = {row["doc"]: row for row in unit.unscored if row["cell"] == cell.cell}
        docs = sorted(own)
        responses = [response for doc in docs for response in stored_responses(own[doc]["responses"])]
        for sample in benchmark.score(docs, responses, judge=judge):
            found = answer_row(cell, own[sample.doc]["doc_digest"], sample)
            rows.append({**own[sample.doc], **{name: found[name] for name in _SCORED}})
    return result_of(rows, judged=judge_rows(unit.task.name, judge))


def _checked(cell: UnitCell, response: Response) -> Response:
    """Return a response, as a failure if its answers came under another plan than the cell's."""
    other = {result.plan_digest for result in response.results} - {cell.plan_digest}
    if not other:
        return response
    message = f"the answer came under plan digest {other.pop()}, not {cell.plan_digest}; ask again (--retry-failed)"
    return Response(failure=Failure(reason=Reason.INTERNAL, message=message), latency_ms=response.latency_ms)


def _first_works(benchmark: Benchmark, docs: Sequence[int], plans: tuple[str, ...]) -> list[Work]:
    """Return the first request of each document that has one, under all plans."""
    works = []
    for doc in docs:
        request = benchmark.first_request(doc, timeout_s=REQUEST_SECONDS)
        if request is not None:
            works.append(Work(request=request, plans=plans))
    return works


def _pictures(benchmark: Benchmark, docs: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for doc in docs:
        request, seen = benchmark.first_request(doc, timeout_s=REQUEST_SECONDS), Preview("", None)
        if request is not None:
            with suppress(SampleError):
                seen = preview(request.messages)
        name = benchmark.label(doc).sample_id
        rows.append({"task": benchmark.name, "doc": doc, "sample_id": name, **seen._asdict()})
    return rows
