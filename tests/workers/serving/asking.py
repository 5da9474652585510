"""Questions to an engine in this process, and what it tells."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shortv.families import LoadedModel
from shortv.families.preprocessing import message_of, prompt_of
from shortv.layers.run import LearnedRun
from shortv.plan import Mode
from shortv.request import Chunk, Completion, Failure, Likelihood, Message, Request, SamplingParams
from shortv.sample import Sample
from shortv.workers.serving.engine import Engine
from shortv.workers.serving.row import Event, Row


@dataclass(slots=True, kw_only=True)
class Told:
    """A row and the events it told."""

    row: Row
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    pieces: list[Chunk] = field(default_factory=list)

    def last(self, timeout: float = 60.0) -> Completion | Failure | Likelihood:
        """The event that ended it."""
        while True:
            event = self.events.get(timeout=timeout)
            if not isinstance(event, Chunk):
                return event
            self.pieces.append(event)

    def answer(self) -> Completion:
        """The answer; fails the test when there is none."""
        found = self.last()
        assert isinstance(found, Completion), found
        return found


def row_of(
    loaded: LoadedModel,
    asked: Sample | Sequence[Message],
    modes: Sequence[Mode] | None = None,
    *,
    run: LearnedRun | None = None,
    seconds: float = 120.0,
    streams: bool = False,
    continuation: str | None = None,
    **decoding: Any,
) -> Told:
    """A row for a sample or a conversation, full unless modes are given."""
    turns = (message_of(asked),) if isinstance(asked, Sample) else tuple(asked)
    events: queue.Queue[Event] = queue.Queue()
    row = Row(
        request=Request(
            request_id="test",
            messages=turns,
            sampling=SamplingParams(**decoding),
            continuation=continuation,
            timeout_s=seconds,
        ),
        prompt=prompt_of(loaded, turns),
        modes=tuple(modes or (Mode.FULL,) * len(loaded.decoder.layers)),
        run=run,
        plan_digest=None,
        tell=events.put,
        streams=streams,
    )
    return Told(row=row, events=events)


def submit(engine: Engine, *told: Told) -> list[Told]:
    """Hand all rows over at once."""
    for one in told:
        engine.submit(one.row)
    return list(told)
