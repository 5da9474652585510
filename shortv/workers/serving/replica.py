"""A Serve replica: one model with all of its plans."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Listed
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

from ray.util.metrics import Counter, Histogram

from shortv.architecture import Architecture
from shortv.errors import Refused, SampleError
from shortv.families import LoadedModel, quiet_transformers
from shortv.layers.progress import LearnedRun
from shortv.learned.files import PartsCache
from shortv.plan import Mode, Plan
from shortv.request import (
    FULL_MODEL,
    Chunk,
    Completion,
    Failure,
    Message,
    PlanSpeed,
    Reason,
    Replies,
    Request,
    Result,
    Work,
)
from shortv.untrusted import image_size
from shortv.workers.models import RemoteModel
from shortv.workers.serving.engine import Engine, failure_of
from shortv.workers.serving.measuring import MeasuredPlan, measure_plans
from shortv.workers.serving.preparing import Prepared, Preparer
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.sequence import Event, Sequence
from shortv.workers.shipping import ShippedFolder

LOG = logging.getLogger("shortv.replica")
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]
_BYTES_PER_PIXEL = 3  # RGB


class ServedPlan(NamedTuple):
    """What sequences run under: modes, what they need beside them, and the plan's digest (None: the full model).

    Under `downsample`, images are made smaller before the prompt is encoded.
    """

    modes: tuple[Mode, ...]
    run: LearnedRun | None = None
    digest: str | None = None
    downsample: float | None = None
    """The prefill FLOPs, of the full model's, to which images are made smaller."""


def read_plans(sources: Iterable[str | Mapping[str, Any]]) -> list[Plan]:
    """Read plans from files, folders, published names and contents of plan files. Raises Refused."""
    return [
        Plan.load(source) if isinstance(source, str) else Plan.from_json(json.dumps(dict(source))) for source in sources
    ]


def fit_plans(
    plans: Iterable[Plan],
    architecture: Architecture,
    *,
    model: str,
    revision: str | None,
    run_of: Callable[[Plan], LearnedRun | None],
) -> tuple[dict[str, ServedPlan], list[str]]:
    """Return plans by name, the full model among them, and warnings about those made for another checkpoint.

    Args:
        run_of: loads, or only checks, the learned parts of a plan.

    Raises:
        Refused: a plan is for another model, two different plans have one name, or learned parts are missing, for
            another model, or cannot run.
    """
    found = {FULL_MODEL: ServedPlan((Mode.FULL,) * architecture.num_layers)}
    warnings = []
    for plan in plans:
        if plan.name in found and found[plan.name].digest != plan.digest:
            raise Refused(f"two different plans are named {plan.name!r}; give one of them another name")
        warnings += plan.check_fits(
            config_digest=architecture.config_digest,
            num_layers=architecture.num_layers,
            model=model,
            revision=revision,
        )
        try:
            found[plan.name] = ServedPlan(plan.modes, run_of(plan), plan.digest, plan.downsample)
        except Refused as error:
            raise Refused(f"plan {plan.name!r}: {error}") from error
    return found, warnings


class Replica:
    """Completes requests under any plan of its `user_config`, `{"plans": [...]}` (sources as `read_plans` takes them).

    Its methods return failures as values: an exception means that the replica itself has failed.
    """

    def __init__(
        self,
        model: RemoteModel,
        *,
        device: str,
        threads: int = 0,
        parts: Mapping[str, ShippedFolder] | None = None,
        engine: EngineSettings | None = None,
    ) -> None:
        """Load the model and start the engine; the full model is served at once, plans come with `reconfigure`.

        Serve stores these arguments, so they contain no secret.

        Args:
            threads: 0 leaves the number to torch.
            parts: folders of learned parts by the path in their plans, for nodes that do not have them.
        """
        quiet_transformers()
        settings = engine or EngineSettings()
        self._loaded: LoadedModel = model.load(device=device, threads=threads)
        self._name = model.spec.name
        self._parts = PartsCache(folders={path: folder.local for path, folder in (parts or {}).items()})
        self._plans = self._fitting({})
        self._image_bytes, self._most_image_bytes = 0, settings.image_bytes
        self._preparer = Preparer(self._loaded)
        self._batch_size = settings.batch_size
        self._engine = Engine(self._loaded, settings)
        self._engine.start()
        self._metrics = _Metrics()
        self._id = uuid4().hex

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve exactly these plans from now on; running requests keep theirs. Raises Refused, changing nothing."""
        # Loading learned parts takes a while, and requests go on meanwhile.
        self._plans = await asyncio.to_thread(self._fitting, user_config)

    def _fitting(self, user_config: Mapping[str, Any]) -> dict[str, ServedPlan]:
        unknown = sorted(user_config.keys() - {"plans"})
        if unknown:
            raise Refused(f"user_config has the unknown key {unknown[0]!r}; give plans, a list of plans")
        loaded = self._loaded
        found, _ = fit_plans(
            read_plans(user_config.get("plans") or ()),
            loaded.architecture,
            model=self._name,
            revision=loaded.revision,
            run_of=lambda plan: self._parts.run(plan, loaded.decoder, loaded.architecture),
        )
        return found

    def check_health(self) -> None:
        """End the process if it can complete nothing any more; Serve then replaces it.

        After an exception here Serve would route requests to it until the third check, and a lost device may keep
        Python from exiting.
        """
        if self._engine.trouble:
            LOG.error("this replica ends: %s", self._engine.trouble)
            os._exit(1)

    async def plans(self) -> dict[str, str]:
        """Return the digest of each plan by name, in the order given, without the full model."""
        return {name: plan.digest for name, plan in self._plans.items() if plan.digest is not None}

    async def complete_all(self, works: Listed[Work]) -> Replies:
        """Complete requests, or score their continuations, each under all of its plans."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._complete(work)) for work in works]
        results = tuple(task.result() for task in tasks)
        return Replies(results=results, clock=self._engine.clock(self._id))

    async def _complete(self, work: Work) -> dict[str, Result]:
        if not work.plans:
            return {}
        started, done, loop = time.monotonic(), asyncio.Event(), asyncio.get_running_loop()
        results: dict[str, Result] = {}

        def emit(plan: str, event: Event) -> None:
            assert not isinstance(event, Chunk)
            results[plan] = event
            # The event loop is woken once for all plans. A closed loop has no listener left.
            if len(results) == len(set(work.plans)):
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(done.set)

        async with self._submitted(work, emit):
            await done.wait()
        for plan, result in results.items():
            self._metrics.record(plan, result, started)
        # In the order of the plans, whichever was ready first.
        return {plan: results[plan] for plan in work.plans}

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Complete a request in chunks; the whole completion or a failure comes last."""
        started, loop = time.monotonic(), asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(_: str, event: Event) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        async with self._submitted(Work(request=request, plans=(request.plan,)), emit, streams=True):
            while True:
                event = await events.get()
                yield event
                if not isinstance(event, Chunk):
                    self._metrics.record(request.plan, event, started)
                    return

    @asynccontextmanager
    async def _submitted(
        self, work: Work, emit: Callable[[str, Event], None], *, streams: bool = False
    ) -> AsyncIterator[None]:
        """Have the engine work on a request under its plans; leaving frees the places, also when the caller goes away.

        Args:
            emit: called with a plan's name and each event under it, from any thread.
        """
        sequences: list[Sequence] = []
        with self._image_memory(work.request.messages) as fits:
            try:
                if fits:
                    sequences = await self._sequences(work, emit, streams=streams)
                else:
                    problem = "the images of other requests fill the memory; try again later"
                    for plan in set(work.plans):
                        emit(plan, Failure(reason=Reason.OVERLOADED, message=problem))
                for sequence in sequences:
                    self._engine.submit(sequence)
                yield
            finally:
                for sequence in sequences:
                    sequence.cancelled = True

    async def _sequences(self, work: Work, emit: Callable[[str, Event], None], *, streams: bool) -> list[Sequence]:
        """Return a sequence for each plan; where there is none, emit why. A request is prepared once for all plans."""
        sequences = []
        prepared: dict[float | None, Prepared | Failure] = {}
        for name in dict.fromkeys(work.plans):
            plan = self._plans.get(name)
            if plan is None:
                emit(name, await self._unknown(name))
                continue
            if plan.downsample not in prepared:
                prepared[plan.downsample] = await self._prepared(work.request, plan.downsample)
            found = prepared[plan.downsample]
            if isinstance(found, Failure):
                emit(name, found)
                continue
            sequence = Sequence(
                request=work.request,
                prepared=found,
                modes=plan.modes,
                run=plan.run,
                plan_digest=plan.digest,
                emit=partial(emit, name),
                streams=streams,
            )
            sequences.append(sequence)
        return sequences

    async def _unknown(self, name: str) -> Failure:
        problem = f"there is no plan {name!r}; the plans are: {', '.join(await self.plans()) or 'none'}"
        return Failure(reason=Reason.UNKNOWN_PLAN, message=problem)

    async def _prepared(self, request: Request, downsample: float | None) -> Prepared | Failure:
        if self._engine.trouble:
            return Failure(reason=Reason.LOST, message=self._engine.trouble)
        try:
            return await self._preparer.prepare(request, downsample)
        except Exception as error:  # one request's failure must not end the others of its call
            return failure_of(error)

    async def measure(self, works: Listed[Work], *, seconds: float) -> tuple[PlanSpeed, ...] | Failure:
        """Measure the speed of the plans of these works, and of the full model, on their prompts.

        Everything is preprocessed before and runs as one batch of at most `batch_size`; nothing else runs meanwhile.
        Prompts with images are preferred. It ends when every ratio's standard error is below 0.5 %, or after `seconds`,
        with five rounds at least. A request that cannot be prepared is left out.
        """
        plans: dict[str, MeasuredPlan] = {}
        batches: dict[float | None, list[Prepared]] = {}
        for name in dict.fromkeys((FULL_MODEL, *(plan for work in works for plan in work.plans))):
            plan = self._plans.get(name)
            if plan is None:
                return await self._unknown(name)
            if plan.downsample not in batches:
                batches[plan.downsample] = await self._measured_batch(works, plan.downsample)
            if not batches[plan.downsample]:
                return Failure(reason=Reason.INVALID, message="none of the requests can be prepared")
            plans[name] = MeasuredPlan(modes=plan.modes, run=plan.run, prepared=batches[plan.downsample])
        try:
            job = self._engine.call(partial(measure_plans, self._loaded, plans, seconds=seconds))
            return await asyncio.wrap_future(job)
        except Exception as error:  # whatever the model or its device raises
            return failure_of(error)

    async def _measured_batch(self, works: Listed[Work], downsample: float | None) -> list[Prepared]:
        requests = [replace(work.request, continuation=None) for work in works]
        found = [await self._prepared(request, downsample) for request in requests]
        usable = [one for one in found if isinstance(one, Prepared)]
        has_images = any(one.encoded.n_visual for one in usable)
        return [one for one in usable if bool(one.encoded.n_visual) == has_images][: self._batch_size]

    @contextmanager
    def _image_memory(self, messages: Iterable[Message]) -> Iterator[bool]:
        """Reserve the bytes of the decoded images for the time of the block; yield whether there are so many.

        However large they are, they may be decoded while no others are.
        """
        size = sum(_decoded_bytes(part) for message in messages for part in message.parts)
        fits = not size or not self._image_bytes or self._image_bytes + size <= self._most_image_bytes
        reserved = size if fits else 0
        self._image_bytes += reserved
        try:
            yield fits
        finally:
            self._image_bytes -= reserved

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


def _decoded_bytes(part: Any) -> int:
    if not isinstance(part, bytes):
        return int(getattr(part, "nbytes", 0))  # an array, or a text
    try:
        width, height = image_size(part)
    except SampleError:  # decoding it fails with the same error
        return 0
    return width * height * _BYTES_PER_PIXEL


class _Metrics:
    """What Ray exports about a replica."""

    def __init__(self) -> None:
        tags = ("plan", "outcome")
        self._requests = Counter("shortv_requests", description="Requests by outcome.", tag_keys=tags)
        self._tokens = Counter("shortv_completion_tokens", description="Tokens generated.", tag_keys=("plan",))
        self._visual = Counter("shortv_visual_tokens", description="Visual tokens of prompts.", tag_keys=("plan",))
        self._seconds = Histogram(
            "shortv_request_seconds", description="Time in the replica.", boundaries=_SECONDS, tag_keys=tags
        )

    def record(self, name: str, event: Result, started: float) -> None:
        """Count a request that ended under the plan of that name; from any thread."""
        outcome = str(event.reason) if isinstance(event, Failure) else "answered"
        # Names that callers choose must not become labels.
        plan = "unknown" if outcome == Reason.UNKNOWN_PLAN else name or "full"
        tags = {"plan": plan, "outcome": outcome}
        self._requests.inc(1, tags)
        self._seconds.observe(time.monotonic() - started, tags)
        if isinstance(event, Completion):
            self._tokens.inc(max(event.completion_tokens, 1), {"plan": plan})
            if event.visual_tokens:
                self._visual.inc(event.visual_tokens, {"plan": plan})
