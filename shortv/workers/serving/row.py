"""One question on its way through a replica."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from shortv.families.preprocessing import Prompt
from shortv.layers.run import LearnedRun
from shortv.plan import Mode
from shortv.request import Chunk, Completion, Failure, Likelihood, Reason, Request, TokenLogprob
from shortv.workers.serving.sampling import Chosen, Sampler
from shortv.workers.serving.transcript import Transcript

Event = Chunk | Completion | Likelihood | Failure
"""What a row tells: pieces while it runs, where they are asked for, then one of the others."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A question, what was made of it so far, and whom to tell; only the engine's thread changes it."""

    request: Request
    prompt: Prompt
    modes: tuple[Mode, ...]
    run: LearnedRun | None = None
    plan_digest: str | None
    tell: Callable[[Event], None]
    streams: bool = False
    most_beside: int = 1 << 30
    """The largest batch it may be in; halved after each failure of a batch it was in."""
    arrived: float = field(default_factory=time.monotonic)
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    """What it is drawn with where the question has no seed; the same when it starts anew."""
    cancelled: bool = False
    """Set by any thread: nobody waits for this row any more."""
    done: bool = False
    sampler: Sampler = field(init=False)
    transcript: Transcript = field(init=False)
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    prefilled: float = 0.0
    """When its first token was chosen."""
    n_text: int = 0
    n_visual: int = 0
    exit_layer: int | None = None
    """After which layer its visual tokens left, where the plan decides that itself."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    told: int = 0
    """Characters of the answer that were told as pieces."""
    told_logprobs: int = 0

    @property
    def plan(self) -> tuple[tuple[Mode, ...], Hashable]:
        """What the model has to be under while it runs."""
        return (self.modes, self.run.identity if self.run else None)

    @property
    def group(self) -> tuple[object, ...]:
        """Rows of one group can run in one batch: the same plan, and images in all prompts or in none."""
        return (*self.plan, self.request.continuation is not None, bool(self.prompt.images))

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.done or self.cancelled

    @property
    def overdue(self) -> bool:
        """Whether the time its question allows is over."""
        return time.monotonic() - self.arrived > self.request.timeout_s

    def begin(self, sampler: Sampler, transcript: Transcript, *, waited_until: float) -> None:
        """Enter a batch; a row that was in one before starts anew, with the same result."""
        self.sampler, self.transcript = sampler, transcript
        self.logprobs = []
        self.queue_ms = 1e3 * (waited_until - self.arrived)

    def add(self, chosen: Chosen) -> None:
        """Take the next token; tells what is sure, and the answer when this ends it."""
        if self.transcript.add(chosen.token) and chosen.logprob is not None:
            self.logprobs.append(chosen.logprob)
        if self.streams:
            self._tell_piece()
        if self.transcript.finish is not None:
            self.finish(self._answer())

    def _tell_piece(self) -> None:
        text = self.transcript.sure()
        # Tokens that show nothing have log-probabilities too.
        untold = self.transcript.finish is not None and len(self.logprobs) > self.told_logprobs
        if len(text) > self.told or untold:
            logprobs = tuple(self.logprobs[self.told_logprobs :])
            self.tell(Chunk(text[self.told :], logprobs))
            self.told, self.told_logprobs = len(text), len(self.logprobs)

    def finish(self, event: Event) -> None:
        """Tell the last event."""
        if not self.done:
            self.done = True
            self.tell(event)

    def fail(self, reason: Reason, message: str) -> None:
        """Tell that there is no answer."""
        self.finish(Failure(reason=reason, message=message))

    def _answer(self) -> Completion:
        transcript = self.transcript
        return Completion(
            text=transcript.text,
            finish_reason=transcript.finish or "stop",
            prompt_tokens=self.n_text + self.n_visual,
            visual_tokens=self.n_visual,
            exit_layer=self.exit_layer,
            completion_tokens=transcript.tokens,
            plan_digest=self.plan_digest,
            queue_ms=self.queue_ms,
            prefill_ms=self.prefill_ms,
            decode_ms=1e3 * (time.monotonic() - self.prefilled),
            logprobs=tuple(self.logprobs),
        )
