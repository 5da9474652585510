"""A Serve replica: one model with all of its plans."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Listed
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

from ray.util.metrics import Counter, Histogram

from shortv.architecture import Architecture
from shortv.errors import Refused, SampleError
from shortv.families import LoadedModel, quiet_transformers
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import adds_special_tokens, prompt_of
from shortv.layers.progress import LearnedRun
from shortv.learned.files import PartsCache
from shortv.plan import Mode, Plan
from shortv.request import (
    FULL_MODEL,
    Chunk,
    Completion,
    EngineClock,
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
from shortv.workers.serving.engine import Engine
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
        # A tokenizer is for one thread at a time, and the processor's own is the engine's.
        self._ahead = replace(self._loaded, processor=deepcopy(self._loaded.processor))
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="shortv-prompts")
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
            tasks = [
                {plan: group.create_task(self.complete(replace(work.request, plan=plan))) for plan in work.plans}
                for work in works
            ]
        results = tuple({plan: task.result() for plan, task in found.items()} for found in tasks)
        return Replies(results=results, clock=EngineClock(replica=self._id, busy_s=0.0, idle_s=0.0))

    async def measure(self, works: Listed[Work], *, seconds: float) -> tuple[PlanSpeed, ...] | Failure:
        """Measure the speed of the plans of these works, and of the full model, on their documents.

        Everything is preprocessed before and runs as one batch of at most `batch_size`; nothing else runs meanwhile.
        It ends when every ratio's standard error is below 0.5 %, or after `seconds`, with three rounds at least.
        """
        plans = dict.fromkeys((FULL_MODEL, *(plan for work in works for plan in work.plans)))
        replies = await self.complete_all([replace(work, plans=tuple(plans)) for work in works])
        found: dict[str, list[Completion]] = {
            plan: [one for each in replies.results if isinstance(one := each[plan], Completion)] for plan in plans
        }
        if not all(found.values()):
            return Failure(reason=Reason.INVALID, message="none of the documents can be completed")
        prefill = {plan: sum(one.prefill_ms for one in each) / len(each) for plan, each in found.items()}
        return tuple(
            PlanSpeed(
                plan=plan,
                batch=len(works),
                rounds=1,
                preprocess_ms=0.0,
                vision_ms=0.0,
                prefill_ms=prefill[plan],
                prefill_ratio=prefill[plan] / prefill[FULL_MODEL],
                prefill_ratio_stderr=0.0,
                decode_ms_per_token=0.0,
                kv_bytes=0.0,
                peak_bytes=None,
            )
            for plan in plans
        )

    async def complete(self, request: Request) -> Result:
        """Complete a request, or score its continuation."""
        last = [event async for event in self.stream(request, in_chunks=False)][-1]
        assert not isinstance(last, Chunk)
        return last

    async def stream(self, request: Request, *, in_chunks: bool = True) -> AsyncIterator[Event]:
        """Complete a request in chunks; the whole completion or a failure comes last."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            # A closed loop has no listener left.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._image_memory(request.messages) as fits:
            problem = "the images of other requests fill the memory; try again later"
            full = Failure(reason=Reason.OVERLOADED, message=problem)
            found = await self._sequence(request, emit, streams=in_chunks) if fits else full
            if isinstance(found, Failure):
                emit(found)
            else:
                self._engine.submit(found)
            try:
                while True:
                    event = await events.get()
                    yield event
                    if not isinstance(event, Chunk):
                        self._metrics.record(request, event, started)
                        return
            finally:
                # Also when the caller goes away: the place is free after the current step.
                if isinstance(found, Sequence):
                    found.cancelled = True

    async def _sequence(self, request: Request, emit: Callable[[Event], None], *, streams: bool) -> Sequence | Failure:
        plan = self._plans.get(request.plan)
        if plan is None:
            problem = f"there is no plan {request.plan!r}; the plans are: {', '.join(await self.plans()) or 'none'}"
            return Failure(reason=Reason.UNKNOWN_PLAN, message=problem)
        if self._engine.trouble:
            return Failure(reason=Reason.LOST, message=self._engine.trouble)
        loop = asyncio.get_running_loop()
        try:
            prompt = await asyncio.to_thread(prompt_of, self._loaded, request.messages)
            text = prompt.text + (request.continuation or "")
            if len(text) > self._loaded.context:
                await loop.run_in_executor(self._preparing, self._check_length, text)
            if plan.downsample is not None:
                arguments = self._ahead, prompt, plan.downsample, self._loaded.architecture
                prompt = await loop.run_in_executor(self._preparing, downsampled, *arguments)
        except SampleError as error:
            return Failure(reason=Reason.INVALID, message=str(error))
        return Sequence(
            request=request,
            prompt=prompt,
            modes=plan.modes,
            run=plan.run,
            plan_digest=plan.digest,
            emit=emit,
            streams=streams,
        )

    def _check_length(self, text: str) -> None:
        """Refuse a prompt beyond the context before it takes the engine's time: megabytes take seconds to tokenize.

        Images count as their placeholders, so that some prompts that pass are still too long. Raises SampleError.
        """
        special = adds_special_tokens(self._ahead, text)
        count = len(self._ahead.processor.tokenizer(text, add_special_tokens=special)["input_ids"])
        if count > self._loaded.context:
            message = f"{count} text tokens exceed the model's context of {self._loaded.context}"
            raise SampleError(stage="tokenise", error="context", message=message)

    @contextmanager
    def _image_memory(self, messages: Iterable[Message]) -> Iterator[bool]:
        """Reserve the bytes of the decoded images for the time of the block; yield whether there are so many.

        However large they are, they may be decoded while no others are.
        """
        size = sum(_decoded_bytes(part) for message in messages for part in message.parts if isinstance(part, bytes))
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


def _decoded_bytes(image: bytes) -> int:
    try:
        width, height = image_size(image)
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

    def record(self, request: Request, event: Event, started: float) -> None:
        """Count a request that ended."""
        outcome = str(event.reason) if isinstance(event, Failure) else "answered"
        # Names that callers choose must not become labels.
        plan = "unknown" if outcome == Reason.UNKNOWN_PLAN else request.plan or "full"
        tags = {"plan": plan, "outcome": outcome}
        self._requests.inc(1, tags)
        self._seconds.observe(time.monotonic() - started, tags)
        if isinstance(event, Completion):
            self._tokens.inc(max(event.completion_tokens, 1), {"plan": plan})
            if event.visual_tokens:
                self._visual.inc(event.visual_tokens, {"plan": plan})
