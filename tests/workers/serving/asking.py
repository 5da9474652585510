"""Questions to an engine in this process, and what it tells."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shortv.chat import Answer, Decoding, Failure, Likelihood, Piece, Question, Turn
from shortv.families import LoadedModel
from shortv.families.encoding import turn_of
from shortv.families.parts import Learned
from shortv.families.prompts import prompt_of
from shortv.plan import Mode
from shortv.sample import Sample
from shortv.workers.serving.engine import Engine
from shortv.workers.serving.row import Event, Row


@dataclass(slots=True, kw_only=True)
class Told:
    """A row and the events it told."""

    row: Row
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    pieces: list[Piece] = field(default_factory=list)

    def last(self, timeout: float = 60.0) -> Answer | Failure | Likelihood:
        """The event that ended it."""
        while True:
            event = self.events.get(timeout=timeout)
            if not isinstance(event, Piece):
                return event
            self.pieces.append(event)

    def answer(self) -> Answer:
        """The answer; fails the test when there is none."""
        found = self.last()
        assert isinstance(found, Answer), found
        return found


def row_of(
    loaded: LoadedModel,
    asked: Sample | Sequence[Turn],
    modes: Sequence[Mode] | None = None,
    *,
    learned: Learned | None = None,
    seconds: float = 120.0,
    streams: bool = False,
    continuation: str | None = None,
    **decoding: Any,
) -> Told:
    """A row for a sample or a conversation, full unless modes are given."""
    turns = (turn_of(asked),) if isinstance(asked, Sample) else tuple(asked)
    events: queue.Queue[Event] = queue.Queue()
    row = Row(
        question=Question(request_id="test", turns=turns, decoding=Decoding(**decoding), seconds=seconds),
        prompt=prompt_of(loaded, turns),
        modes=tuple(modes or (Mode.FULL,) * len(loaded.decoder.layers)),
        learned=learned,
        plan_digest=None,
        tell=events.put,
        streams=streams,
        continuation=continuation,
    )
    return Told(row=row, events=events)


def submit(engine: Engine, *told: Told) -> list[Told]:
    """Hand all rows over at once."""
    for one in told:
        engine.submit(one.row)
    return list(told)
