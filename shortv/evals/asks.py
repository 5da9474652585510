"""What lmms-eval asks, as questions to replicas."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from PIL import Image

from shortv import request as serving
from shortv.errors import Refused, ShortVError
from shortv.evals.decoding import chat_decoding, seeded
from shortv.evals.prompts import turns_of
from shortv.evals.requests import Conversation, Documents, Request, conversation, generation, likelihood
from shortv.request import FULL_MODEL, Message, SamplingParams


class Kind(StrEnum):
    """What is wanted: an answer, the likelihood of a continuation, or the answers of several rounds."""

    GENERATE = "generate"
    LIKELIHOOD = "likelihood"
    MULTI_ROUND = "multi-round"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a document; images are decoded when its question is due."""

    kind: Kind
    request: Request
    """Of a multi-round request: its first round."""
    conversation: Conversation | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    doc_id: int
    index: int = 0
    """Which of the document's requests this is."""
    repeat: int = 0
    """Which time it is asked, for tasks with `repeats`."""

    @property
    def name(self) -> str:
        """Which document of which task, for messages about it."""
        return self.request.name

    def turns(self) -> list[Message]:
        """The conversation with its images as PIL images. Raises as `turns_of`."""
        return turns_of(self.request)

    def question(
        self, *, plan: str = FULL_MODEL, seconds: float = 600.0, request: Request | None = None
    ) -> serving.Request:
        """The question for a plan, its images encoded; `request` is a later round of the conversation.

        Raises:
            ShortVError: the task gives no prompt, or an image cannot be read.
        """
        asked = request or self.request
        try:
            turns = encoded(turns_of(asked))
        except ShortVError:
            raise
        except Exception as error:  # messages come from third-party code, images may be damaged
            raise ShortVError(f"{self.name} gives no prompt: {type(error).__name__}: {error}") from error
        return serving.Request(
            request_id=uuid.uuid4().hex,
            plan=plan,
            messages=turns,
            sampling=self.sampling,
            continuation=self.request.continuation if self.kind is Kind.LIKELIHOOD else None,
            timeout_s=seconds,
        )


def ask_of(instance: Any, documents: Documents, *, seed: int, repeat: int = 0) -> Ask:
    """Read one of lmms-eval's requests, whatever it asks for. Sampled answers depend on the seed.

    Raises:
        Refused: a generation setting that replicas do not have, or a kind of request that is not known.
    """
    where: dict[str, Any] = {"doc_id": instance.doc_id, "index": instance.idx, "repeat": repeat}
    if instance.request_type == "loglikelihood":
        return Ask(kind=Kind.LIKELIHOOD, request=likelihood(instance, documents), **where)
    if instance.request_type == "generate_until":
        ask = Ask(kind=Kind.GENERATE, request=generation(instance, documents), **where)
    elif instance.request_type == "generate_until_multi_round":
        talk = conversation(instance, documents)
        ask = Ask(kind=Kind.MULTI_ROUND, request=talk.first, conversation=talk, **where)
    else:
        raise Refused(
            f"task {instance.task_name!r} asks by {instance.request_type}; replicas answer generate_until, "
            "generate_until_multi_round and loglikelihood; choose another task"
        )
    decoding = chat_decoding(ask.request.gen_kwargs)
    return replace(ask, sampling=seeded(decoding, seed, ask.name, instance.idx, repeat))


def encoded(turns: Iterable[Message]) -> tuple[Message, ...]:
    """The turns with their PIL images as PNG files, which lose nothing that a model sees."""
    return tuple(replace(turn, parts=tuple(map(_encoded_part, turn.parts))) for turn in turns)


def _encoded_part(part: object) -> object:
    if not isinstance(part, Image.Image):
        return part
    stream = io.BytesIO()
    # Models are shown images as RGB, and PNG does not hold every mode of PIL.
    image = part if part.mode == "RGB" else part.convert("RGB")
    # Level 1: the file travels once, mostly inside a machine, and packing it tighter costs more than that.
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()
