"""From chat messages to model inputs, through the processor's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shortv.errors import Refused, ShortVError
from shortv.evals.requests import Request
from shortv.families import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation as the model's template writes it, up to where the model answers."""

    name: str
    text: str
    images: tuple[Image.Image, ...]
    continuation: str = ""


def prompt_of(loaded: LoadedModel, request: Request) -> Prompt:
    """Apply the chat template to a request's messages.

    Raises:
        Refused: the messages hold a video, sound or anything else that is neither text nor an image.
        ShortVError: an image cannot be read, or the template cannot write the messages.
    """
    images: list[Image.Image] = []
    turns = []
    for message in request.messages():
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append({"role": message["role"], "content": [_part(part, images, request.name) for part in parts]})
    try:
        text = loaded.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, chat_template=loaded.chat_template
        )
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        raise ShortVError(f"the chat template of {loaded.name} cannot write {request.name}: {error}") from error
    return Prompt(name=request.name, text=text, images=tuple(images), continuation=request.continuation)


def _part(part: Mapping[str, Any], images: list[Image.Image], name: str) -> dict[str, str]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise Refused(f"{name} holds {part['type']}, and the model shortv reads text and images; choose an image task")
    images.append(_image(part.get("url", part.get("image")), name))
    return {"type": "image"}


def _image(source: Any, name: str) -> Image.Image:
    try:
        if isinstance(source, str | Path):
            with Image.open(source) as image:
                return image.convert("RGB")
        if isinstance(source, Image.Image):
            return source.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for a damaged file
        raise ShortVError(f"an image of {name} cannot be read: {type(error).__name__}: {error}") from error
    raise Refused(f"{name} gives a {type(source).__name__} as image; the model shortv reads PIL images and files")


def inputs_of(loaded: LoadedModel, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Encode prompts with their continuations into one left-padded batch on the model's device.

    The prompts must all have images or all have none.

    Raises:
        ShortVError: the processor cannot encode them, images became no visual tokens, or the context is exceeded.
    """
    names = prompts[0].name if len(prompts) == 1 else f"{prompts[0].name} and {len(prompts) - 1} more"
    # One list per prompt, as the processors' own apply_chat_template passes them.
    images = [list(prompt.images) for prompt in prompts]
    try:
        inputs: dict[str, Tensor] = dict(
            loaded.processor(
                images=images if any(images) else None,
                text=[prompt.text + prompt.continuation for prompt in prompts],
                padding=True,
                padding_side="left",
                return_tensors="pt",
                add_special_tokens=adds_special_tokens(loaded, prompts[0].text),
            )
        )
    except Exception as error:  # processors raise whatever their libraries raise on odd sizes and texts
        raise ShortVError(f"{names} cannot be encoded: {type(error).__name__}: {error}") from error
    _check(loaded, prompts, inputs)
    dtype = loaded.model.dtype
    return {
        name: value.to(loaded.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    """Whether the tokenizer has to add what a template that writes its own beginning of sequence has put there."""
    bos = loaded.processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _check(loaded: LoadedModel, prompts: Sequence[Prompt], inputs: Mapping[str, Tensor]) -> None:
    visual_BT = torch.isin(inputs["input_ids"], torch.tensor(sorted(loaded.decoder.visual_ids)))
    lengths_B = inputs["attention_mask"].sum(1)
    for prompt, visual, length in zip(prompts, visual_BT.any(1).tolist(), lengths_B.tolist(), strict=True):
        if visual != bool(prompt.images):
            raise ShortVError(
                f"the {len(prompt.images)} images of {prompt.name} do not match its visual tokens; "
                "does the chat template place images?"
            )
        if length > loaded.context:
            raise ShortVError(
                f"{prompt.name} has {length} tokens, more than the model's context of {loaded.context}; "
                "leave it out, or choose a model with a longer context"
            )
