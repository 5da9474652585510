"""What a campaign lacks, streamed in units to its workers: each is committed once, and a group ends with its tables."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from reports.changes import documents_of
from shortv.errors import Refused, ShortVError, one_line
from shortv.request import EngineClock, PlanSpeed
from shortv.terminal import say
from shortv.workers.campaign.cells import Group
from shortv.workers.campaign.comparisons import with_corrections
from shortv.workers.campaign.folder import TABLES, CampaignFolder
from shortv.workers.campaign.producer import MEASURED_DOCUMENTS, ProducerLost, lost_rows
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.summary import result_line
from shortv.workers.campaign.tables import Rows, group_tables
from shortv.workers.campaign.units import SHARD, Unit, shards
from shortv.workers.progress import SampleProgress
from shortv.workers.run import Stopped

if TYPE_CHECKING:
    from shortv.workers.campaign.workers import Pool

_DEATHS: Final = 3
"""Producers that may die with a unit, and then with a document, before it counts as the cause."""


class Stream:
    """What a group lacks: the documents of each cell, and whether the speed of its plans was measured."""

    def __init__(self, group: Group, folder: CampaignFolder, spec: CampaignSpec, claimed: Collection[str]) -> None:
        self.group = group
        missing = folder.missing(group, retry_failed=spec.retry_failed)
        self.missing = {key: lacking for key, lacking in missing.items() if key not in claimed}
        self.unscored = folder.unscored(group) if spec.retry_failed else []
        self.unmeasured = bool(group.task.num_docs) and not self.missing.keys() <= folder.measured().keys()
        self.clocks: dict[str, EngineClock] = {}
        self.suspects: list[Unit] = []
        """Units of one document with which producers died among others; they are tried again when all else is done."""
        self.problem: str | None = None
        """Why documents could not be asked."""

    @property
    def pairs(self) -> int:
        """Answers that are missing, or lack their scores."""
        return sum(int(lacking.sum()) for lacking in self.missing.values()) + len(self.unscored)

    @property
    def asks(self) -> bool:
        """Whether replicas are needed."""
        return self.unmeasured or self.pairs > len(self.unscored)

    def units(self, app: str, pool: Pool) -> Iterator[Unit]:
        """Yield the units that are missing."""
        for docs, cells in shards(self.missing):
            yield self.unit(app, pool, docs, cells)
        by_shard: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in self.unscored:
            by_shard[row["doc"] // SHARD].append(row)
        for rows in by_shard.values():
            docs, cells = tuple(sorted({row["doc"] for row in rows})), tuple({row["cell"]: None for row in rows})
            yield replace(self.unit(app, pool, docs, cells), unscored=tuple(rows))

    def unit(self, app: str, pool: Pool, docs: Sequence[int], cells: Sequence[str]) -> Unit:
        """Return a unit of the group."""
        task, distinct = self.group.task, self.group.distinct
        return Unit(
            app=app,
            task=pool.sources[task.name],
            docs=tuple(docs),
            digests=tuple(task.document_digests[list(docs)].tolist()),
            cells=tuple(distinct[key].in_unit() for key in cells),
        )


class Work:
    """Streams units of all groups to producers, and ends each group when its last unit is committed."""

    def __init__(
        self, spec: CampaignSpec, folder: CampaignFolder, pool: Pool, bar: SampleProgress, tables: Tables
    ) -> None:
        self._spec, self._folder, self._pool, self._bar, self._tables = spec, folder, pool, bar, tables
        self._clocks: dict[str, EngineClock] = {}
        """The last clock of each replica when the group before ended."""

    async def run(self, streams: Sequence[Stream]) -> None:
        """Answer what is missing, model by model.

        The replicas of a model start when the last units of the one before are on their way.
        """
        try:
            async with asyncio.TaskGroup() as watching:
                watch = watching.create_task(self._pool.watch())
                async with asyncio.TaskGroup() as tasks:
                    for _, group in groupby(streams, key=lambda stream: stream.group.model.name):
                        await self._hand_out([one for one in group if one.pairs or one.unmeasured], tasks)
                watch.cancel()
        except* Exception as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        await look_at_changes(self._folder, streams, self._pool, self._tables)

    async def _hand_out(self, streams: Sequence[Stream], tasks: asyncio.TaskGroup) -> None:
        if not streams:
            return
        try:
            app = await self._start(streams) if any(one.asks for one in streams) else ""
        except (Stopped, Refused):
            raise
        except Exception as error:  # without replicas of this model, only its own cells fail
            for stream in streams:
                await self._tables.end(stream, _line(error))
            return
        ending = []
        for stream in streams:
            units = []
            for unit in stream.units(app, self._pool):
                await self._pool.enter()
                units.append(tasks.create_task(self._answer(stream, unit)))
            ending.append(tasks.create_task(self._end_stream(stream, app, units)))
        tasks.create_task(self._end_model(app, ending))

    async def _start(self, streams: Sequence[Stream]) -> str:
        facts = streams[0].group.model
        model = self._spec.of_model(facts.name).model_copy(update={"revision": facts.revision})
        cells = {cell.entry.name: cell.plan for stream in streams for cell in stream.group.distinct.values()}
        began = time.monotonic()
        app = await self._pool.start(model, tuple(plan for plan in cells.values() if plan is not None))
        self._tables.note(f"replicas of {facts.name} run after {time.monotonic() - began:.0f} s")
        return app

    async def _answer(self, stream: Stream, unit: Unit) -> None:
        try:
            judged = await asyncio.to_thread(self._folder.judged.of, unit.task.name, unit.docs)
            await self._finish(stream, replace(unit, judged=judged))
        finally:
            await self._pool.leave()

    async def _finish(self, stream: Stream, unit: Unit, deaths: int = 0) -> None:
        """Answer a unit and commit it; where producers keep dying with it, its documents are tried one by one.

        A producer works on many units, and each of them may be the cause of its end.
        """
        try:
            result = await self._pool.run(unit)
        except ProducerLost as error:
            if deaths + 1 < _DEATHS:
                await self._finish(stream, unit, deaths + 1)
                return
            if len(unit.docs) > 1:
                for single in unit.singles():
                    await self._finish(stream, single)
                return
            if unit not in stream.suspects:
                stream.suspects.append(unit)
                return
            message = f"answer: lost: {_DEATHS} producers died with the document ({error})"
            result = lost_rows(unit, lambda doc: stream.group.task.label(doc).sample_id, message)
        except Exception as error:  # a node without the task, or with other documents
            stream.problem = _line(error)
            return
        await asyncio.to_thread(self._folder.commit, result)
        stream.clocks.update(result.clocks)
        self._bar.advance(result.rows, sum(result.errors.values()))

    async def _end_stream(self, stream: Stream, app: str, units: Sequence[asyncio.Task[None]]) -> None:
        """Measure the plans of a group when its answers are there, and make its tables."""
        await asyncio.gather(*units)
        for unit in stream.suspects:
            await self._finish(stream, unit)
        if stream.unmeasured and stream.problem is None:
            await self._measure(stream, app)
        await self._tables.end(stream, stream.problem)

    async def _measure(self, stream: Stream, app: str) -> None:
        docs = range(min(MEASURED_DOCUMENTS, stream.group.task.num_docs))
        cells = {cell.served: cell for cell in (one.in_unit() for one in stream.group.distinct.values())}
        try:
            unit = stream.unit(app, self._pool, docs, [cell.cell for cell in cells.values()])
            speeds = {speed.plan: speed for speed in await self._pool.measure(unit)}
        except Exception as error:  # answers are there without it
            self._tables.warn(f"the speed of {stream.group.shown} was not measured: {_line(error)}")
            return
        shared = {"idle_share": self._idle_share(stream), "replicas": len(stream.clocks) or None}
        rows = [
            {
                "cell": cell.cell,
                "model": cell.model,
                "plan": cell.plan,
                "task": cell.task,
                **speed_row(speeds[name]),
                **shared,
            }
            for name, cell in cells.items()
            if name in speeds
        ]
        if rows:
            await asyncio.to_thread(self._folder.commit_measured, rows)

    def _idle_share(self, stream: Stream) -> float | None:
        """Return the share of the time in which the models' threads had no work while the group was answered."""
        zero = EngineClock(replica="", busy_s=0.0, idle_s=0.0)
        idle = busy = 0.0
        for replica, clock in stream.clocks.items():
            before = self._clocks.get(replica, zero)
            idle, busy = idle + clock.idle_s - before.idle_s, busy + clock.busy_s - before.busy_s
        self._clocks.update(stream.clocks)
        return idle / (idle + busy) if idle + busy > 0 else None

    async def _end_model(self, app: str, ending: Sequence[asyncio.Task[None]]) -> None:
        await asyncio.gather(*ending)
        if app:
            await self._pool.stop(app)


class Tables:
    """The rows of the groups that have come to their end, and the tables of the campaign."""

    def __init__(self, folder: CampaignFolder, streams: Sequence[Stream], spec: CampaignSpec, console: Console) -> None:
        self._folder, self._streams, self._spec, self._console = folder, streams, spec, console
        self._rows: dict[str, Rows] = {}
        self._lock = asyncio.Lock()

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.note(f"Warning: {text}")

    def note(self, text: str) -> None:
        """Print a line."""
        say(self._console, text)

    async def end(self, stream: Stream, problem: str | None) -> None:
        """Make the rows of a group, write all tables, and print the group's results."""
        async with self._lock:
            await asyncio.to_thread(self._make, stream, problem)
            await asyncio.to_thread(self._folder.write_tables, self._together())
        done = sum(len(rows["cells"]) for rows in self._rows.values())
        total = sum(len(one.group.cells) for one in self._streams)
        metrics = self._rows[stream.group.shown]["metrics"]
        for at, row in enumerate(self._rows[stream.group.shown]["cells"]):
            number = done - len(stream.group.cells) + at + 1
            say(self._console, f"[{number}/{total}] {result_line(row, metrics, stream.group.task.main_metric)}")

    def _make(self, stream: Stream, problem: str | None) -> None:
        self._folder.answers.update()
        limit, seed = self._spec.limit, self._spec.seed
        self._rows[stream.group.shown] = group_tables(
            stream.group, self._folder, limit=limit, seed=seed, problem=problem
        )

    def of_all(self) -> Rows:
        """Make the rows of the groups that are left, write all tables, and return their rows."""
        for stream in self._streams:
            if stream.group.shown not in self._rows:
                self._make(stream, None)
        rows = self._together()
        self._folder.write_tables(rows)
        return rows

    def _together(self) -> Rows:
        """Return the rows of all groups that have ended, in the order of the recipe."""
        ended = [self._rows[stream.group.shown] for stream in self._streams if stream.group.shown in self._rows]
        found = {name: [row for rows in ended for row in rows[name]] for name in TABLES}
        return found | {"comparisons": with_corrections(found["comparisons"])}


async def look_at_changes(folder: CampaignFolder, streams: Sequence[Stream], pool: Pool | None, tables: Tables) -> None:
    """Write what plans changed, with questions and pictures of the documents, those that are new from the pool."""
    rows = await asyncio.to_thread(folder.changes, [stream.group for stream in streams])
    known = {(row["task"], row["doc"]): row for row in await asyncio.to_thread(folder.thumbnails)}
    shown = []
    for task, docs in documents_of(rows).items():
        shown += [known[task, doc] for doc in docs if (task, doc) in known]
        new = [doc for doc in docs if (task, doc) not in known]
        try:
            shown += await pool.pictures(pool.sources[task], new) if pool and new else []
        except Exception as error:  # tables and answers are there without them
            tables.warn(f"documents of {task} have no pictures: {_line(error)}")
    await asyncio.to_thread(folder.write_changes, rows, shown)


def speed_row(speed: PlanSpeed) -> dict[str, Any]:
    """Return what was measured of a plan, by the columns of the table `measured`."""
    same = ("batch", "rounds", "prefill_ratio", "prefill_ratio_stderr", "ttft_ms", "kv_bytes", "peak_bytes")
    return {
        **{name: getattr(speed, name) for name in same},
        "batch_prefill_ms": speed.prefill_ms,
        "step_ms": speed.decode_ms_per_token,
    }


def _line(error: BaseException) -> str:
    # Errors of other libraries are named by their type.
    return one_line(error) if isinstance(error, ShortVError) else f"{type(error).__name__}: {one_line(error)}"
