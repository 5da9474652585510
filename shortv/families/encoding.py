"""From samples to model inputs: one user turn through the processor's own chat template, then the generation prompt."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile
from torch import Tensor

from shortv.errors import SampleError
from shortv.families.loading import LoadedModel
from shortv.sample import Sample
from shortv.tokens import TokenTypes, token_types

IMAGE_MARKER = "<image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A padded batch on the model's device: keyword arguments for the model, and what stands at each position."""

    inputs: dict[str, Tensor]
    types: TokenTypes


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The samples of a batch that could be encoded, and those that could not, with the reason."""

    batch: Batch | None
    samples: tuple[Sample, ...]
    errors: tuple[tuple[Sample, SampleError], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    sample: Sample
    text: str
    images: tuple[Image.Image, ...]


def encode(loaded: LoadedModel, samples: Sequence[Sample]) -> Encoded:
    """Encode samples into one padded batch; a bad sample becomes an error and never takes a good one with it."""
    errors: list[tuple[Sample, SampleError]] = []
    prompts: list[_Prompt] = []
    for sample in samples:
        try:
            prompts.append(_prompt(loaded, sample))
        except SampleError as error:
            errors.append((sample, error))
    batch = None
    try:
        batch = _batch(loaded, prompts) if prompts else None
    except SampleError:
        faults = [_fault(loaded, prompt) for prompt in prompts]
        errors += [(prompt.sample, fault) for prompt, fault in zip(prompts, faults, strict=True) if fault]
        prompts = [prompt for prompt, fault in zip(prompts, faults, strict=True) if not fault]
        batch = _batch(loaded, prompts) if prompts else None
    return Encoded(batch=batch, samples=tuple(prompt.sample for prompt in prompts), errors=tuple(errors))


def _fault(loaded: LoadedModel, prompt: _Prompt) -> SampleError | None:
    try:
        _batch(loaded, [prompt])
    except SampleError as error:
        return error
    return None


def _prompt(loaded: LoadedModel, sample: Sample) -> _Prompt:
    images = tuple(_decode(content, number) for number, content in enumerate(sample.images))
    messages = [{"role": "user", "content": _content(sample.prompt, len(images))}]
    try:
        text = loaded.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, chat_template=loaded.chat_template
        )
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        raise SampleError(stage="prompt", error="chat-template", message=_one_line(error)) from error
    return _Prompt(sample=sample, text=text, images=images)


def _decode(content: bytes | None, number: int) -> Image.Image:
    if not content:
        raise SampleError(stage="decode", error="empty-image", message=f"image {number} has no bytes")
    try:
        with _whole_images_only(), Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise anything from SyntaxError to struct.error on corrupt bytes
        message = f"image {number} of {len(content)} bytes cannot be decoded: {_one_line(error)}"
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


def _content(prompt: str, n_images: int) -> list[dict[str, str]]:
    """Split a prompt at its image markers; without markers the images come first."""
    image = {"type": "image"}
    pieces = prompt.split(IMAGE_MARKER)
    markers = len(pieces) - 1
    if markers == 0:
        return [image] * n_images + [{"type": "text", "text": prompt}]
    if markers != n_images:
        message = f"the prompt has {markers} {IMAGE_MARKER} markers but the sample has {n_images} images"
        raise SampleError(stage="prompt", error="image-count", message=message)
    content: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append(image)
        if piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def _batch(loaded: LoadedModel, prompts: Sequence[_Prompt]) -> Batch:
    inputs = _process(loaded, prompts)
    types = token_types(inputs["input_ids"], inputs["attention_mask"], loaded.decoder.visual_ids)
    for prompt, n_text, n_visual in zip(prompts, types.n_text, types.n_visual, strict=True):
        _check_fits(loaded, prompt, n_text, n_visual)
    if loaded.decoder.family.positions_from_mask:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    dtype = loaded.model.dtype
    moved = {
        name: value.to(loaded.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    types = TokenTypes(visual_BT=types.visual_BT.to(loaded.device), text_BT=types.text_BT.to(loaded.device))
    return Batch(inputs=moved, types=types)


def _check_fits(loaded: LoadedModel, prompt: _Prompt, n_text: int, n_visual: int) -> None:
    if bool(prompt.images) != bool(n_visual):
        message = f"{len(prompt.images)} images became {n_visual} visual tokens; does the chat template place images?"
        raise SampleError(stage="tokenise", error="visual-tokens", message=message)
    if n_text + n_visual > loaded.context:
        message = f"{n_text} text and {n_visual} visual tokens exceed the model's context of {loaded.context}"
        raise SampleError(stage="tokenise", error="context", message=message)


def _process(loaded: LoadedModel, prompts: Sequence[_Prompt]) -> dict[str, Tensor]:
    # One list per prompt, as the processors' own apply_chat_template passes them: LLaVA-OneVision tiles an image only
    # where it is a prompt's only one, and Gemma 3 takes a flat list for the images of one prompt.
    images = [list(prompt.images) for prompt in prompts]
    bos = loaded.processor.tokenizer.bos_token
    try:
        inputs: Any = loaded.processor(
            images=images if any(images) else None,
            text=[prompt.text for prompt in prompts],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
        )
    except Exception as error:  # processors raise whatever their libraries raise on odd sizes and texts
        raise SampleError(stage="tokenise", error=type(error).__name__, message=_one_line(error)) from error
    return dict(inputs)


def _one_line(error: Exception) -> str:
    # A memory address would make the same failure read differently in every run.
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the bytes", str(error))
    return re.sub(r"\s+", " ", text).strip()[:500] or type(error).__name__
