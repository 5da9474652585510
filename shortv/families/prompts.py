"""From conversations to model inputs, through the processor's own chat template."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageFile
from torch import Tensor

from shortv.chat import Turn
from shortv.errors import SampleError
from shortv.families.loading import LoadedModel
from shortv.families.tokens import TokenTypes, token_types


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation as the model's template writes it, up to where the model answers."""

    text: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A padded batch: keyword arguments for the model, and what stands at each position."""

    inputs: dict[str, Tensor]
    types: TokenTypes

    def on(self, loaded: LoadedModel) -> Batch:
        """The same batch on the model's device, pixels in its dtype."""
        dtype = loaded.model.dtype
        moved = {
            name: value.to(loaded.device, dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }
        types = TokenTypes(
            visual_BT=self.types.visual_BT.to(loaded.device), text_BT=self.types.text_BT.to(loaded.device)
        )
        return Batch(inputs=moved, types=types)


def prompt_of(loaded: LoadedModel, turns: Sequence[Turn], *, generation_prompt: bool = True) -> Prompt:
    """Apply the chat template to a conversation and decode its images.

    Args:
        generation_prompt: end where the model is to answer; without it the conversation ends with its last turn.

    Raises:
        SampleError: an image cannot be decoded, or the template cannot write the conversation.
    """
    images: list[Image.Image] = []
    messages = [{"role": turn.role, "content": [_part(part, images) for part in turn.parts]} for turn in turns]
    try:
        text = loaded.processor.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=False, chat_template=loaded.chat_template
        )
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        message = f"the chat template cannot write the conversation: {one_line(error)}"
        raise SampleError(stage="prompt", error="chat-template", message=message) from error
    return Prompt(text=text, images=tuple(images))


def _part(part: object, images: list[Image.Image]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    images.append(_decoded(part, len(images)))
    return {"type": "image"}


def _decoded(content: object, number: int) -> Image.Image:
    if not content:
        raise SampleError(stage="decode", error="empty-image", message=f"image {number} has no bytes")
    try:
        if isinstance(content, Image.Image):
            return content.convert("RGB")
        if not isinstance(content, bytes):
            raise TypeError(f"{type(content).__name__} is neither bytes nor a PIL image")
        with _whole_images_only(), Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise anything from SyntaxError to struct.error on corrupt bytes
        size = f" of {len(content)} bytes" if isinstance(content, bytes) else ""
        message = f"image {number}{size} cannot be decoded: {one_line(error)}"
        raise SampleError(stage="decode", error=type(error).__name__, message=message) from error


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Let a truncated file be an error; some libraries tell PIL, for the whole process, to fill it with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def batch_of(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    continuations: Sequence[str] | None = None,
    padding_side: Literal["left", "right"] | None = None,
) -> Batch:
    """Encode prompts, each with what follows it where that is given, into one padded batch in the CPU's memory.

    Some processors take prompts with images or prompts without, not both at once.

    Args:
        padding_side: the tokenizer's own unless given; generation needs the left.

    Raises:
        SampleError: the processor fails on one of them, images became no visual tokens, or a prompt exceeds the
            model's context. To find out which, encode each alone.
    """
    following = continuations or [""] * len(prompts)
    texts = [prompt.text + continuation for prompt, continuation in zip(prompts, following, strict=True)]
    # One list per prompt, as the processors' own apply_chat_template passes them: LLaVA-OneVision tiles an image only
    # where it is a prompt's only one, and Gemma 3 takes a flat list for the images of one prompt.
    images = [list(prompt.images) for prompt in prompts]
    try:
        found: Any = loaded.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(loaded, texts[0]),
            **({"padding_side": padding_side} if padding_side else {}),
        )
    except Exception as error:  # processors raise whatever their libraries raise on odd sizes and texts
        raise SampleError(stage="tokenise", error=type(error).__name__, message=one_line(error)) from error
    inputs: dict[str, Tensor] = dict(found)
    types = token_types(inputs["input_ids"], inputs["attention_mask"], loaded.decoder.visual_ids)
    for prompt, n_text, n_visual in zip(prompts, types.n_text, types.n_visual, strict=True):
        _check_fits(loaded, prompt, n_text, n_visual)
    return Batch(inputs=inputs, types=types)


def adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    """Whether the tokenizer has to add what a template that writes its own beginning of sequence has put there."""
    bos = loaded.processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _check_fits(loaded: LoadedModel, prompt: Prompt, n_text: int, n_visual: int) -> None:
    if bool(prompt.images) != bool(n_visual):
        message = f"{len(prompt.images)} images became {n_visual} visual tokens; does the chat template place images?"
        raise SampleError(stage="tokenise", error="visual-tokens", message=message)
    if n_text + n_visual > loaded.context:
        message = f"{n_text} text and {n_visual} visual tokens exceed the model's context of {loaded.context}"
        raise SampleError(stage="tokenise", error="context", message=message)


def one_line(error: Exception) -> str:
    """An error's message on one line, the same in every run."""
    # A memory address would make the same failure read differently.
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the bytes", str(error))
    return re.sub(r"\s+", " ", text).strip()[:500] or type(error).__name__
