"""A Serve replica: one model with all of its plans."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Histogram

from shortv.errors import Refused, SampleError
from shortv.request import Chunk, Completion, Failure, Likelihood, Message, Reason, Request
from shortv.untrusted import image_size
from shortv.workers.models import RemoteModel
from shortv.workers.serving.engine import Engine, EngineSettings
from shortv.workers.serving.plans import PlanBook, read_plans
from shortv.workers.serving.sequence import Event, Sequence
from shortv.workers.shipping import ShippedFolder

if TYPE_CHECKING:
    from shortv.families import LoadedModel

LOG = logging.getLogger("shortv.replica")
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]
_BYTES_PER_PIXEL = 3  # RGB


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetup:
    """What a replica is started with. `threads` 0 leaves the number to torch.

    `parts` are folders of learned parts by the path in their plans, for nodes that do not have them. Serve stores the
    setup, so it contains no secret.
    """

    model: RemoteModel
    device: str
    threads: int = 0
    parts: Mapping[str, ShippedFolder] = field(default_factory=dict)
    engine: EngineSettings = field(default_factory=EngineSettings)


class Replica:
    """Completes requests under any plan of its `user_config`, `{"plans": [...]}` (see `plans.PlanSource`).

    Its methods return failures as values: an exception means that the replica itself has failed.
    """

    def __init__(self, setup: ReplicaSetup) -> None:
        """Load the model and start the engine; the full model is served at once, plans come with `reconfigure`."""
        from shortv.families import quiet_transformers
        from shortv.learned.files import PartsCache

        quiet_transformers()
        self._loaded: LoadedModel = setup.model.load(device=setup.device, threads=setup.threads)
        self._name = setup.model.spec.name
        self._parts = PartsCache(folders={path: folder.local for path, folder in setup.parts.items()})
        self._book = self._book_of({})
        self._length = PromptLength(self._loaded)
        self._images = ImageMemory(setup.engine.image_bytes)
        self._engine = Engine(self._loaded, setup.engine)
        self._engine.start()
        self._metrics = _Metrics()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve exactly these plans from now on; running requests keep theirs. Raises Refused, changing nothing."""
        # Loading learned parts takes a while, and requests go on meanwhile.
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
        """End the process if it can complete nothing any more; Serve then replaces it.

        After an exception here Serve would route requests to it until the third check, and a lost device may keep
        Python from exiting.
        """
        if self._engine.trouble:
            LOG.error("this replica ends: %s", self._engine.trouble)
            os._exit(1)

    async def plans(self) -> dict[str, str]:
        """Return the digest of each plan by name."""
        return self._book.digests()

    async def complete(self, request: Request) -> Completion | Failure:
        """Complete a request."""
        last: Any = None
        async for event in self._events(request):
            last = event
        return last  # type: ignore[no-any-return]  # the last event is one of the two

    async def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        """Complete a request in chunks; the whole completion or a failure comes last."""
        async for event in self._events(request, streams=True):
            yield event  # type: ignore[misc]  # a likelihood is emitted only for a continuation

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

        def emit(event: Event) -> None:
            # A closed loop has no listener left.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._images.reserved(request.messages) as fits:
            problem = "the images of other requests fill the memory; try again later"
            full = Failure(reason=Reason.OVERLOADED, message=problem)
            sequence = await self._sequence(request, emit, streams=streams) if fits else full
            if isinstance(sequence, Failure):
                self._metrics.record(request, sequence, started)
                yield sequence
                return
            self._engine.submit(sequence)
            try:
                while True:
                    event = await events.get()
                    yield event
                    if not isinstance(event, Chunk):
                        self._metrics.record(request, event, started)
                        return
            finally:
                # Also when the caller goes away: the place is free after the current step.
                sequence.cancelled = True

    async def _sequence(self, request: Request, emit: Callable[[Event], None], *, streams: bool) -> Sequence | Failure:
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
        return Sequence(
            request=request,
            prompt=prompt,
            modes=modes,
            run=book.run(request.plan),
            plan_digest=book.digest(request.plan),
            emit=emit,
            streams=streams,
        )

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


class ImageMemory:
    """Bounds the bytes of the images that are decoded at a time. For one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self.used = 0
        """Bytes that are reserved now."""
        self._max_bytes = max_bytes

    @contextmanager
    def reserved(self, messages: Iterable[Message]) -> Iterator[bool]:
        """Reserve the bytes that the images need for the time of the block; yield whether there are so many.

        However large they are, they may be decoded while no others are.
        """
        size = sum(_decoded_bytes(part) for message in messages for part in message.parts)
        fits = not size or not self.used or self.used + size <= self._max_bytes
        reserved = size if fits else 0
        self.used += reserved
        try:
            yield fits
        finally:
            self.used -= reserved


def _decoded_bytes(part: object) -> int:
    try:
        width, height = image_size(part) if isinstance(part, bytes) else getattr(part, "size", (0, 0))
    except SampleError:  # decoding it fails with the same error
        return 0
    return int(width * height * _BYTES_PER_PIXEL)


class PromptLength:
    """Counts the tokens of long prompts in a thread of its own; the engine counts those of short ones.

    Prompts beyond the context are refused before they take the engine's time: megabytes take seconds to tokenize.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        # A tokenizer is for one thread at a time, and the processor's own is the engine's.
        self._tokenizer = deepcopy(loaded.processor.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shortv-prompt-length")

    async def check(self, text: str) -> None:
        """Check a prompt. Images count as their placeholders, so that some prompts that pass are still too long.

        Raises:
            SampleError: it exceeds the model's context.
        """
        if len(text) > self._loaded.context:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._check, text)

    def _check(self, text: str) -> None:
        from shortv.families.preprocessing import adds_special_tokens

        special = adds_special_tokens(self._loaded, text)
        count = len(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        if count > self._loaded.context:
            message = f"{count} text tokens exceed the model's context of {self._loaded.context}"
            raise SampleError(stage="tokenise", error="context", message=message)


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
        unknown = isinstance(event, Failure) and event.reason is Reason.UNKNOWN_PLAN
        # Names that callers choose must not become labels.
        plan = "unknown" if unknown else request.plan or "full"
        tags = {"plan": plan, "outcome": outcome}
        self._requests.inc(1, tags)
        self._seconds.observe(time.monotonic() - started, tags)
        if isinstance(event, Completion):
            self._tokens.inc(max(event.completion_tokens, 1), {"plan": plan})
            if event.visual_tokens:
                self._visual.inc(event.visual_tokens, {"plan": plan})
