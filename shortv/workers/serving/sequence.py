"""A request inside the engine: its prompt, the tokens and text generated so far, and where its events go."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field, replace
from typing import Any

from shortv.families import LoadedModel
from shortv.layers.progress import LearnedRun
from shortv.plan import Mode
from shortv.request import Chunk, Completion, Failure, Likelihood, Reason, Request, TokenLogprob
from shortv.workers.serving.preparing import Prepared
from shortv.workers.serving.sampling import Chosen, Sampler

Event = Chunk | Completion | Likelihood | Failure
"""What a sequence emits: chunks while it runs, if they are requested, then one of the others."""
# What a tokenizer shows for bytes that are not yet a whole character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns the tokens of a completion into text, ends it at a stop, and knows which text can no longer change."""

    def __init__(self, tokenizer: Any, *, stop: Iterable[str], ends: Iterable[int], limit: int) -> None:
        """End the completion at one of the texts `stop`, at one of the tokens `ends`, or after `limit` tokens."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ends = frozenset(ends)
        self._limit = limit
        self._ids: list[int] = []
        # A token may end inside a character, and its text may depend on the few tokens before it.
        self._settled = ""
        self._settled_ids = 0
        self.text = ""
        """The text so far, cut at a stop."""
        self.tokens = 0
        """Number of tokens, with the one that ended the completion."""
        self.finish_reason: str | None = None
        """ "stop" or "length"; None while the completion is not finished."""

    def add(self, token: int) -> bool:
        """Add a token; return whether it belongs to the completion (an end token does not)."""
        self.tokens += 1
        if token in self._ends:
            self.finish_reason = "stop"
            return False
        self._ids.append(token)
        self.text = self._settled + self._decoded(self._settled_ids)
        if not self.text.endswith(_INCOMPLETE) and len(self._ids) - self._settled_ids > 8:
            self._settle()
        cut = min((at for at in (self.text.find(stop) for stop in self._stop) if at >= 0), default=None)
        if cut is not None:
            self.text = self.text[:cut]
            self.finish_reason = "stop"
        elif self.tokens >= self._limit:
            self.finish_reason = "length"
        return True

    def final_text(self) -> str:
        """Return the part of the text that no later token can change or cut away."""
        if self.finish_reason is not None:
            return self.text
        # An incomplete character may become the next one of a stop.
        whole = self.text.rstrip(_INCOMPLETE)
        begun = (size for stop in self._stop for size in range(1, len(stop)) if whole.endswith(stop[:size]))
        return whole[: len(whole) - max(begun, default=0)]

    def _settle(self) -> None:
        """Keep the text of all but the last tokens, if decoding the two parts separately gives the same text."""
        middle = len(self._ids) - 4
        head = self._tokenizer.decode(self._ids[self._settled_ids : middle], skip_special_tokens=True)
        if not head.endswith(_INCOMPLETE) and head + self._decoded(middle) == self._decoded(self._settled_ids):
            self._settled += head
            self._settled_ids = middle

    def _decoded(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True))


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request in the engine; only the engine's thread changes it, apart from `cancelled`."""

    request: Request
    prepared: Prepared
    modes: tuple[Mode, ...]
    run: LearnedRun | None = None
    plan_digest: str | None
    emit: Callable[[Event], None]
    streams: bool = False
    max_batch: int = 1 << 30
    """The largest batch it may run in; halved after each failure of a batch with it."""
    arrived: float = field(default_factory=time.monotonic)
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    """Used where the request has no seed; the same in every attempt."""
    cancelled: bool = False
    """Set by any thread: nobody waits for this sequence any more."""
    finished: bool = False
    plan: tuple[tuple[Mode, ...], Hashable] = field(init=False)
    """What the model has to run under."""
    group: tuple[object, ...] = field(init=False)
    """Sequences of one group can run in one batch: the same plan, and images in all prompts or in none."""
    sampler: Sampler = field(init=False)
    output: Detokenizer = field(init=False)
    queue_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_batch: int = 1
    prefilled_at: float = 0.0
    busy_ms: float = 0.0
    exit_layer: int | None = None
    """The layer after which its visual tokens left, if the plan decides that for each sample."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _replay: list[int] = field(default_factory=list)
    """The tokens behind the streamed text, which an attempt after a failure must generate again."""
    _streamed_tokens: int = 0
    _streamed_chars: int = 0
    _streamed_logprobs: int = 0

    def __post_init__(self) -> None:
        self.plan = (self.modes, self.run.identity if self.run else None)
        self.group = (*self.plan, self.request.continuation is not None, self.prepared.encoded.n_visual > 0)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.finished or self.cancelled

    def begin(self, loaded: LoadedModel, prompt: Listed[int], *, started: float) -> None:
        """Enter a batch whose prefill started at that time. After a failed attempt everything is generated again."""
        if len(self.tokens) >= self._streamed_tokens:
            self._replay = self.tokens[: self._streamed_tokens]
        sampling, tokenizer = self.request.sampling, loaded.processor.tokenizer
        ends, stop = self.prepared.ends, self.prepared.stop
        limit = max(1, min(sampling.max_tokens, loaded.context - len(prompt)))
        self.sampler = Sampler(sampling, seed=self.seed, prompt=prompt, ends=ends, tokenizer=tokenizer)
        self.output = Detokenizer(tokenizer, stop=stop, ends=ends, limit=limit)
        self.tokens, self.logprobs = [], []
        self.busy_ms = 0.0
        self.queue_ms = 1e3 * (started - self.arrived)

    def add(self, chosen: Chosen) -> None:
        """Add the next token; emit the text that is final, and the completion if the token ends it."""
        position = len(self.tokens)
        if position < len(self._replay) and chosen.token != self._replay[position]:
            # Rounding differs between batches: going on would join the beginning of one text to the end of another.
            problem = "after an error in its batch the completion came out differently from what was streamed"
            self.fail(Reason.INTERNAL, f"{problem}; send the request again")
            return
        self.tokens.append(chosen.token)
        if self.output.add(chosen.token) and chosen.logprob is not None:
            self.logprobs.append(chosen.logprob)
        if self.streams:
            self._emit_chunk()
        if self.output.finish_reason is not None:
            self.finish(self._completion(self.output.finish_reason))

    def _emit_chunk(self) -> None:
        text = self.output.final_text()
        # Tokens without text have log-probabilities too.
        rest = self.output.finish_reason is not None and len(self.logprobs) > self._streamed_logprobs
        if len(text) > self._streamed_chars or rest:
            self.emit(Chunk(text[self._streamed_chars :], tuple(self.logprobs[self._streamed_logprobs :])))
            self._streamed_chars, self._streamed_logprobs = len(text), len(self.logprobs)
            self._streamed_tokens = len(self.tokens)

    def finish(self, event: Event) -> None:
        """Emit the last event, once."""
        if not self.finished:
            self.finished = True
            self.emit(event)

    def fail(self, reason: Reason, message: str) -> None:
        """Finish with a failure."""
        self.finish(Failure(reason=reason, message=message))

    def end_scored(self, likelihood: Likelihood) -> None:
        """Finish with the log-likelihood of the continuation."""
        self.finish(replace(likelihood, **self._measured()))

    def _completion(self, finish_reason: str) -> Completion:
        return Completion(
            text=self.output.text,
            finish_reason=finish_reason,
            completion_tokens=self.output.tokens,
            logprobs=tuple(self.logprobs),
            decode_ms=1e3 * (time.monotonic() - self.prefilled_at),
            **self._measured(),
        )

    def _measured(self) -> dict[str, Any]:
        encoded = self.prepared.encoded
        return {
            "prompt_tokens": encoded.n_text + encoded.n_visual,
            "visual_tokens": encoded.n_visual,
            "plan_digest": self.plan_digest,
            "exit_layer": self.exit_layer,
            "queue_ms": self.queue_ms,
            "preprocess_ms": self.prepared.preprocess_ms,
            "vision_ms": self.vision_ms,
            "prefill_ms": self.prefill_ms,
            "prefill_batch": self.prefill_batch,
            "busy_ms": self.busy_ms,
        }
