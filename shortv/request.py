"""Requests to a model and their completions, as callers, endpoint and replicas exchange them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

FULL_MODEL = ""
"""The plan name of the unmodified model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation: its role, and texts and images in their order.

    A part is text (str), an encoded image file (bytes), or, inside one process, a decoded PIL image.
    """

    role: str
    parts: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens. `seed` makes a sampled completion repeatable,
    whatever runs in the same batch. A completion ends before the first of the texts `stop`.
    `top_logprobs` asks for the log-probability of each token and of so many alternatives; None asks for none.
    """

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A conversation for a model under the plan of that name, to be completed within `timeout_s` seconds.

    With a `continuation` the request asks for the log-likelihood of that text instead of a completion.
    """

    request_id: str
    plan: str = FULL_MODEL
    messages: tuple[Message, ...]
    sampling: SamplingParams = SamplingParams()
    continuation: str | None = None
    timeout_s: float = 600.0


class TokenLogprob(NamedTuple):
    """A token as text, its log-probability in nats, and the most likely tokens at its position with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Chunk(NamedTuple):
    """The next part of a completion that is streamed."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The text that a model generated for a request, token counts and times.

    `prompt_tokens` includes visual tokens. `finish_reason` is "stop" (the model or a stop text ended it) or "length".
    `exit_layer` is the layer after which the visual tokens left, under a plan that decides it for each sample (the
    number of layers where they never left); None under other plans and for prompts without an image.
    Milliseconds: waiting in the queue, the prefill of the batch, and all decode steps until the end.
    """

    text: str
    finish_reason: str
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
    """Why a request has no completion."""

    INVALID = "invalid"
    """The request itself cannot be completed: a damaged image, too long a prompt."""
    UNKNOWN_PLAN = "unknown-plan"
    OVERLOADED = "overloaded"
    """The queue is full; a later request may succeed."""
    DEADLINE = "deadline"
    LOST = "lost"
    """The replica or its device failed; another replica can complete the request."""
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no completion; the message is one line for the caller and contains nothing of the conversation."""

    reason: Reason
    message: str

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return self.reason in (Reason.OVERLOADED, Reason.LOST)
