"""Sequences for an engine in this process, and the events they emit."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from shortv.families import LoadedModel
from shortv.families.preprocessing import Prompt, message_of, prompt_of
from shortv.layers.progress import LearnedRun
from shortv.plan import Mode
from shortv.request import Chunk, Completion, Failure, Likelihood, Message, Request, SamplingParams
from shortv.sample import Sample
from shortv.workers.serving.engine import Engine
from shortv.workers.serving.preparing import prepare
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.sequence import Event, Sequence
from tests.tiny_model import bundled

GUARD_S = 120.0
"""Bounds waiting for events, so that a hang fails; no test depends on how long anything takes."""


@dataclass(slots=True, kw_only=True)
class Submitted:
    """A sequence and the events it has emitted."""

    sequence: Sequence
    prompt: Prompt
    events: queue.Queue[Event]
    chunks: list[Chunk] = field(default_factory=list)

    def next_chunk(self) -> Chunk:
        event = self.events.get(timeout=GUARD_S)
        assert isinstance(event, Chunk), event
        self.chunks.append(event)
        return event

    def last(self) -> Completion | Failure | Likelihood:
        """Wait for the event that ends it."""
        while isinstance(event := self.events.get(timeout=GUARD_S), Chunk):
            self.chunks.append(event)
        return event

    def completion(self) -> Completion:
        found = self.last()
        assert isinstance(found, Completion), found
        return found

    def failure(self) -> Failure:
        found = self.last()
        assert isinstance(found, Failure), found
        return found

    @property
    def streamed(self) -> str:
        """The text of the chunks."""
        return "".join(chunk.text for chunk in self.chunks)


def sequence_of(
    loaded: LoadedModel,
    content: Sample | Listed[Message],
    modes: Listed[Mode] | None = None,
    *,
    run: LearnedRun | None = None,
    timeout_s: float = 10 * GUARD_S,
    streams: bool = False,
    continuation: str | None = None,
    **sampling: Any,
) -> Submitted:
    """A sequence for a sample or a conversation, under the full model unless modes are given."""
    messages = (message_of(content),) if isinstance(content, Sample) else tuple(content)
    parameters, more = SamplingParams(**sampling), {"continuation": continuation, "timeout_s": timeout_s}
    events: queue.Queue[Event] = queue.Queue()
    request = Request(request_id="test", messages=messages, sampling=parameters, **more)  # type: ignore[arg-type]
    sequence = Sequence(
        request=request,
        prepared=prepare(loaded, request),
        modes=tuple(modes or (Mode.FULL,) * len(loaded.decoder.layers)),
        run=run,
        plan_digest=None,
        emit=events.put,
        streams=streams,
    )
    return Submitted(sequence=sequence, prompt=prompt_of(loaded, messages), events=events)


def submit(engine: Engine, *submitted: Submitted) -> list[Submitted]:
    for one in submitted:
        engine.submit(one.sequence)
    return list(submitted)


@contextmanager
def running(settings: EngineSettings | None = None, loaded: LoadedModel | None = None) -> Iterator[Engine]:
    engine = Engine(loaded or bundled(), settings or EngineSettings())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
