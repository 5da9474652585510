"""Requests to a model and their completions, as callers, endpoint and replicas exchange them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

FULL_MODEL = ""
"""The plan name of the unmodified model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation: its role, and texts and images in their order.

    A part is text (str), an encoded image file (bytes), or a decoded image: a uint8 array (H, W, 3), or inside one
    process a PIL image.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request to be completed under each of these plans; the request's own plan is not read.

    Its images are decoded, processed and seen by the vision tower once.
    """

    request: Request
    plans: tuple[str, ...]


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
class Measured:
    """Token counts of a request under a plan, and what its parts took, in milliseconds.

    `prompt_tokens` includes visual tokens. `exit_layer` is the layer after which the visual tokens left, under a plan
    that decides it for each sample (the number of layers where they never left); None under other plans and for
    prompts without an image. Times on a device include waiting for it.
    """

    prompt_tokens: int = 0
    visual_tokens: int = 0
    plan_digest: str | None = None
    exit_layer: int | None = None
    queue_ms: float = 0.0
    """Between preprocessing and the prefill."""
    preprocess_ms: float = 0.0
    """Decoding and processing of the images, and tokenisation; once for all plans of a `Work`."""
    vision_ms: float = 0.0
    """The vision tower on the prompt's images when it ran for them (its share of their batch), whichever plan ran."""
    prefill_ms: float = 0.0
    """The prefill of the whole batch: the language model alone, without the vision tower."""
    prefill_batch: int = 1
    """Number of sequences in that batch."""
    decode_ms: float = 0.0
    """From the first token to the last, steps of other batches included."""
    busy_ms: float = 0.0
    """Its share of the engine's time: of each step that it took part in, divided by the sequences of that step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Measured):
    """The text that a model generated for a request.

    `finish_reason` is "stop" (the model or a stop text ended it) or "length".
    """

    text: str
    finish_reason: str
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood(Measured):
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


Result = Completion | Likelihood | Failure
"""What becomes of a request under one plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineClock:
    """How long a replica's engine worked, and how long it had nothing to do, since its first sequence (seconds)."""

    replica: str
    busy_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """The result of each work under each of its plans, by the plan's name, in the order of the works."""

    results: tuple[Mapping[str, Result], ...]
    clock: EngineClock | None = None
    """The clock of the replica that replied last; None if none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpeed:
    """How fast one replica prefills and decodes a fixed batch under a plan, measured beside all other plans.

    Medians over rounds, in milliseconds, device synchronised. `prefill_ratio` is the median over rounds of the plan's
    prefill divided by the full model's in the same round.
    """

    plan: str
    batch: int
    """Sequences in the batch."""
    rounds: int
    preprocess_ms: float
    """Preprocessing of the batch in one thread."""
    vision_ms: float
    """The vision tower on the images of the batch."""
    prefill_ms: float
    """The language model on the batch."""
    prefill_ratio: float
    prefill_ratio_stderr: float
    """Standard error of that median."""
    decode_ms_per_token: float
    """A decode step of the whole batch."""
    kv_bytes: float
    """KV cache of a document after its prefill."""
    peak_bytes: int | None
    """Most memory allocated on the device, weights included; None on CPUs."""

    @property
    def ttft_ms(self) -> float:
        """Time to the first token of a batch of this size that finds the replica idle: the sum of its parts."""
        return self.preprocess_ms + self.vision_ms + self.prefill_ms
