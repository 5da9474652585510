"""lmms-eval's messages as prompts, whose failures name the document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from shortv.errors import Refused, SampleError, ShortVError
from shortv.evals.requests import Request
from shortv.families import LoadedModel
from shortv.families.preprocessing import Prompt, batch_of, prompt_of
from shortv.request import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPrompt:
    """A prompt, the continuation whose likelihood is asked, and which document of which task it is."""

    name: str
    prompt: Prompt
    continuation: str = ""


def named_prompt(loaded: LoadedModel, request: Request) -> NamedPrompt:
    """Apply the chat template to a request's messages.

    Raises:
        Refused: the messages hold a video, sound or anything else that is neither text nor an image.
        ShortVError: an image cannot be read, or the template cannot write the messages.
    """
    turns = turns_of(request)
    with _naming(request.name):
        return NamedPrompt(name=request.name, prompt=prompt_of(loaded, turns), continuation=request.continuation)


def turns_of(request: Request) -> list[Message]:
    """A request's messages with their images as PIL images. Raises as `named_prompt` does."""
    turns = []
    for message in request.messages():
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append(Message(role=message["role"], parts=tuple(_part(part, request.name) for part in parts)))
    return turns


def _part(part: Mapping[str, Any], name: str) -> str | Image.Image:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] != "image":
        raise Refused(f"{name} holds {part['type']}, and the model shortv reads text and images; choose an image task")
    return _image(part.get("url", part.get("image")), name)


def _image(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path):
        raise Refused(f"{name} gives a {type(source).__name__} as image; the model shortv reads PIL images and files")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for a damaged file
        raise ShortVError(f"an image of {name} cannot be read: {type(error).__name__}: {error}") from error


def inputs_of(loaded: LoadedModel, prompts: Sequence[NamedPrompt]) -> dict[str, Tensor]:
    """Encode prompts with their continuations into one left-padded batch on the model's device.

    The prompts must all have images or all have none. Raises ShortVError as `batch_of` raises SampleError.
    """
    with _naming(prompts[0].name if len(prompts) == 1 else f"{prompts[0].name} and {len(prompts) - 1} more"):
        batch = batch_of(
            loaded,
            [replace(named.prompt, continuation=named.continuation) for named in prompts],
            padding_side="left",
        )
    return batch.on(loaded).inputs


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except SampleError as error:
        raise ShortVError(f"{name} cannot be encoded ({error.error}): {error}") from error
