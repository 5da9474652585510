"""Conversations and answers, as callers and replicas exchange them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

FULL_MODEL = ""
"""The plan name of the unmodified model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message: who speaks, and texts and images in their order.

    A part is text (str), an encoded image file (bytes), or inside one process a decoded PIL image.
    """

    role: str
    parts: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How an answer is made. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave all tokens.

    `seed` makes a sampled answer repeatable, whatever runs beside it. `stops` end an answer and are not part of it.
    `top_logprobs`, where it is not None, asks for the log-probability of each token and of so many alternatives.
    """

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A conversation for a model under the plan of that name, to be answered within `seconds`."""

    request_id: str
    plan: str = FULL_MODEL
    turns: tuple[Turn, ...]
    decoding: Decoding = Decoding()
    seconds: float = 600.0


class TokenLogprob(NamedTuple):
    """A token as text, its log-probability in nats, and the most likely tokens at its place with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Piece(NamedTuple):
    """The next part of an answer that is streamed."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, what it was made of, and what it cost.

    `prompt_tokens` counts visual tokens too; `finish` is "stop" (the model or a stop text ended it) or "length".
    `exit_layer` is the layer after which its visual tokens left, under a plan that decides it for each sample; the
    number of layers stands for never, None for other plans and for prompts without an image.
    Milliseconds: waiting for a place, the prefill of the batch it was in, and all decode steps until it ended.
    """

    text: str
    finish: str
    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    plan_digest: str | None
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    exit_layer: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Likelihood(NamedTuple):
    """Sum of the log-probabilities of a continuation's tokens, and whether greedy decoding would choose each."""

    log_probability: float
    is_greedy: bool


class Reason(StrEnum):
    """Why a question has no answer."""

    INVALID = "invalid"
    """The question itself cannot be answered: a damaged image, too long a prompt."""
    UNKNOWN_PLAN = "unknown-plan"
    OVERLOADED = "overloaded"
    """No place in the queue; later there may be one."""
    DEADLINE = "deadline"
    LOST = "lost"
    """The replica or its device went away; another replica can answer."""
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer; the message is one line for the caller and holds nothing of the conversation."""

    reason: Reason
    message: str

    @property
    def passing(self) -> bool:
        """Whether the same question may be answered when it is asked again."""
        return self.reason in (Reason.OVERLOADED, Reason.LOST)
