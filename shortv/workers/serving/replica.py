"""A Serve replica: one model, all of its plans."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Histogram

from shortv.errors import Refused, SampleError
from shortv.request import Chunk, Completion, Failure, Likelihood, Reason, Request
from shortv.spec import ModelSpec
from shortv.workers.models import Environment
from shortv.workers.serving.engine import Engine, EngineSettings
from shortv.workers.serving.image_room import ImageRoom
from shortv.workers.serving.plans import PlanBook, read_plans
from shortv.workers.serving.row import Event, Row
from shortv.workers.shipping import ShippedFolder

LOG = logging.getLogger("shortv.replica")
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]

_NO_ROOM = Failure(reason=Reason.OVERLOADED, message="the images of other requests fill the memory; ask again later")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetup:
    """Everything a replica is told once. `threads` 0 leaves the number to torch.

    `parts` are folders of learned parts by the path that plans name, for nodes that lack them.
    """

    spec: ModelSpec
    device: str
    threads: int = 0
    folder: ShippedFolder | None = None
    parts: Mapping[str, ShippedFolder] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)
    environment: Environment = field(default_factory=Environment)


class Replica:
    """Answers questions under any plan of its `user_config`, `{"plans": [...]}` (see `plans.PlanSource`).

    Its methods return failures as values: an exception means that the replica itself is gone.
    """

    def __init__(self, setup: ReplicaSetup) -> None:
        """Load the model and start the engine; the full model is served at once, plans come with `reconfigure`."""
        os.environ.update(setup.environment)
        import torch

        from shortv.families import load, quiet_transformers
        from shortv.learned.files import PartsCache
        from shortv.workers.serving.prompt_length import PromptLength

        quiet_transformers()
        if setup.threads:
            torch.set_num_threads(setup.threads)
        folder = setup.folder.local() if setup.folder else None
        spec = setup.spec.model_copy(update={"name": str(folder)}) if folder else setup.spec
        self._loaded = load(
            spec.name,
            revision=spec.revision,
            dtype=spec.dtype,
            device=setup.device,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )
        self._name = setup.spec.name
        self._parts = PartsCache(folders={path: folder.local for path, folder in setup.parts.items()})
        self._book = self._book_of({})
        self._length = PromptLength(self._loaded)
        self._room = ImageRoom(setup.engine.image_bytes)
        self._engine = Engine(self._loaded, setup.engine)
        self._engine.start()
        self._metrics = _Metrics()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve exactly these plans from now on; questions that run keep theirs. Raises Refused, changing nothing."""
        # Loading learned parts takes a while, and answers go on meanwhile.
        self._book = await asyncio.to_thread(self._book_of, user_config)

    def _book_of(self, user_config: Mapping[str, Any]) -> PlanBook:
        unknown = sorted(user_config.keys() - {"plans"})
        if unknown:
            raise Refused(f"user_config has the unknown key {unknown[0]!r}; give plans, a list of plans")
        return PlanBook(
            self._loaded.architecture,
            read_plans(user_config.get("plans") or ()),
            model=self._name,
            revision=self._loaded.revision,
            runs=lambda plan: self._parts.run(plan, self._loaded.decoder, self._loaded.architecture),
        )

    def check_health(self) -> None:
        """End the process when it can answer nothing any more; Serve then replaces it.

        After an error Serve would send it questions until a third check, and a lost device may keep Python from ending.
        """
        if self._engine.trouble:
            LOG.error("this replica ends: %s", self._engine.trouble)
            os._exit(1)

    async def plans(self) -> dict[str, str]:
        """Digest of each plan by name."""
        return self._book.digests()

    async def complete(self, request: Request) -> Completion | Failure:
        """Answer one request."""
        last: Any = None
        async for event in self._events(request):
            last = event
        return last  # type: ignore[no-any-return]  # events end with one of the two

    async def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        """Answer one question in pieces, which end with the whole answer or a failure."""
        async for event in self._events(request, streams=True):
            yield event  # type: ignore[misc]  # a likelihood is only told where one is asked

    async def score(self, request: Request) -> Likelihood | Failure:
        """Score the continuation of a request."""
        last: Any = None
        async for event in self._events(request):
            last = event
        return last  # type: ignore[no-any-return]

    async def _events(self, request: Request, *, streams: bool = False) -> AsyncIterator[Event]:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            # A loop that is closed has nobody left to hear it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._room.taken(request.messages) as fits:
            row = await self._row(request, tell, streams=streams) if fits else _NO_ROOM
            if isinstance(row, Failure):
                self._metrics.note(request, row, started)
                yield row
                return
            self._engine.submit(row)
            try:
                while True:
                    event = await events.get()
                    yield event
                    if not isinstance(event, Chunk):
                        self._metrics.note(request, event, started)
                        return
            finally:
                # Also when the caller goes away: the place is free after the current step.
                row.cancelled = True

    async def _row(self, request: Request, tell: Any, *, streams: bool) -> Row | Failure:
        from shortv.families.preprocessing import prompt_of

        book = self._book
        modes = book.modes(request.plan)
        if modes is None:
            known = ", ".join(book.digests()) or "none"
            message = f"there is no plan {request.plan!r}; the plans are: {known}"
            return Failure(reason=Reason.UNKNOWN_PLAN, message=message)
        if self._engine.trouble:
            return Failure(reason=Reason.LOST, message=self._engine.trouble)
        try:
            prompt = await asyncio.to_thread(prompt_of, self._loaded, request.messages)
            await self._length.check(prompt.text + (request.continuation or ""))
        except SampleError as error:
            return Failure(reason=Reason.INVALID, message=str(error))
        return Row(
            request=request,
            prompt=prompt,
            modes=modes,
            run=book.run(request.plan),
            plan_digest=book.digest(request.plan),
            tell=tell,
            streams=streams,
        )

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


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

    def note(self, request: Request, event: Event, started: float) -> None:
        """Count a request that ended."""
        outcome = str(event.reason) if isinstance(event, Failure) else "answered"
        unknown = isinstance(event, Failure) and event.reason is Reason.UNKNOWN_PLAN
        # Names that callers make up are no labels.
        plan = "unknown" if unknown else request.plan or "full"
        tags = {"plan": plan, "outcome": outcome}
        self._requests.inc(1, tags)
        self._seconds.observe(time.monotonic() - started, tags)
        if isinstance(event, Completion):
            self._tokens.inc(max(event.completion_tokens, 1), {"plan": plan})
            if event.visual_tokens:
                self._visual.inc(event.visual_tokens, {"plan": plan})
