"""From messages to model inputs: images, the processor's chat template, tokens and padding. Needs no weights.

Sweeps, replicas, the model in one process and training all prepare their prompts here:
`Sample` -> `Message` (`message_of`) -> `Prompt` (`prompt_of`) -> `EncodedPrompt` (`encode_one`) -> `Batch` (`join`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from shortv.errors import SampleError, one_line
from shortv.families.pixels import PIXEL_INPUTS, Pixels, images_of, stacked
from shortv.families.table import Family
from shortv.families.tokens import TokenTypes, token_types
from shortv.request import Message
from shortv.sample import Sample
from shortv.untrusted import is_unicode, open_image

if TYPE_CHECKING:
    from shortv.families.loading import LoadedModel

IMAGE_MARKER = "<image>"
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """What decides how messages become the inputs of a model; it can run in a process without the weights."""

    family: Family
    processor: Any
    """The processor of transformers: tokenizer, image processor, chat template."""
    visual_ids: frozenset[int]
    """The placeholder ids that vision features replace."""
    context: int
    """The largest number of tokens in a prompt."""
    chat_template: str | None
    """Jinja text that replaces the processor's own template, if given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation as the chat template renders it, up to where the model answers."""

    text: str
    images: tuple[Image.Image, ...]
    continuation: str = ""
    """Text that follows the prompt in the same forward: an answer to score or to train on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the processor encodes it, in CPU memory and without padding."""

    inputs: Mapping[str, Tensor]
    """A batch of one."""
    images: tuple[Pixels, ...]
    """Its images as the vision tower gets them, in their order."""
    n_text: int
    n_visual: int

    @property
    def ids(self) -> list[int]:
        """The tokens, visual ones as placeholders."""
        found: list[int] = self.inputs["input_ids"][0].tolist()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A padded batch: keyword arguments for the model, and the type of each position."""

    inputs: dict[str, Tensor]
    types: TokenTypes
    images: tuple[Pixels, ...] | None = None
    """The images of its prompts, in their order, where the batch was joined; always in CPU memory."""

    def on(self, loaded: LoadedModel) -> Batch:
        """Return the batch on the model's device, pixels in the model's dtype."""
        dtype = loaded.model.dtype
        moved = {
            name: value.to(loaded.device, dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=moved, types=self.types.on(loaded.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A batch of the samples that can be used, and the errors of those that cannot."""

    batch: Batch | None
    """None if no sample can be used."""
    samples: tuple[Sample, ...]
    errors: tuple[tuple[Sample, SampleError], ...]


def message_of(sample: Sample) -> Message:
    """Return a sample as one user message, its prompt split at the image markers; without markers images come first.

    Raises:
        SampleError: the number of markers differs from the number of images.
    """
    texts = sample.prompt.split(IMAGE_MARKER)
    markers, images = len(texts) - 1, list(sample.images)
    if markers == 0:
        return Message(role="user", parts=(*images, sample.prompt))
    if markers != len(images):
        message = f"the prompt has {markers} {IMAGE_MARKER} markers but the sample has {len(images)} images"
        raise SampleError("prompt", "image-count", message)
    parts: list[str | bytes] = []
    for number, text in enumerate(texts):
        if number:
            parts.append(images[number - 1])
        if text.strip():
            parts.append(text.strip("\n"))
    return Message(role="user", parts=tuple(parts))


def prompt_of(
    preprocessor: Preprocessor,
    messages: Sequence[Message],
    *,
    continuation: str = "",
    generation_prompt: bool = True,
) -> Prompt:
    """Decode the images of a conversation and render it with the chat template.

    Args:
        continuation: text that follows the prompt in the same forward.
        generation_prompt: end where the model is to answer; without it the prompt ends with the last message.

    Raises:
        SampleError: an image cannot be decoded, a text is not valid Unicode, or the template cannot render the
            conversation.
    """
    images: list[Image.Image] = []

    def content(part: Any) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": _unicode(part)}
        try:
            images.append(open_image(part))
        except SampleError as error:
            message = f"image {len(images)} cannot be used: {one_line(error, limit=500)}"
            raise SampleError(error.stage, error.error, message) from error
        return {"type": "image"}

    conversation = [{"role": one.role, "content": [content(part) for part in one.parts]} for one in messages]
    try:
        text = preprocessor.processor.apply_chat_template(
            conversation,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            chat_template=preprocessor.chat_template,
        )
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        message = f"the chat template cannot render the conversation: {one_line(error, limit=500)}"
        raise SampleError("prompt", "chat-template", message) from error
    return Prompt(text=text, images=tuple(images), continuation=_unicode(continuation))


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise SampleError("prompt", "not-unicode", f"the prompt is not valid Unicode text: {text!a:.80}")
    return text


def batch_of(
    preprocessor: Preprocessor, prompts: Sequence[Prompt], *, padding_side: PaddingSide | None = None
) -> Batch:
    """Encode prompts with their continuations into one padded batch in CPU memory.

    Args:
        padding_side: the processor's own unless given; generation needs the left.

    Raises:
        SampleError: as `encode_one`, for the first prompt that cannot be encoded.
    """
    return join(preprocessor, [encode_one(preprocessor, prompt) for prompt in prompts], padding_side=padding_side)


def encode_one(preprocessor: Preprocessor, prompt: Prompt) -> EncodedPrompt:
    """Encode a prompt with its continuation.

    Raises:
        SampleError: the processor fails on it, images became no visual tokens, or it exceeds the model's context.
    """
    text, images = prompt.text + prompt.continuation, list(prompt.images)
    try:
        encoded: Any = preprocessor.processor(
            # One list per prompt, as the processors' own apply_chat_template passes them: LLaVA-OneVision tiles an
            # image only where it is a prompt's only one, and Gemma 3 takes a flat list for the images of one prompt.
            images=[images] if images else None,
            text=[text],
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(preprocessor, text),
        )
    except Exception as error:  # processors raise whatever their libraries raise on odd sizes and texts
        raise SampleError("tokenise", type(error).__name__, one_line(error, limit=500)) from error
    inputs: dict[str, Tensor] = dict(encoded)
    types = token_types(inputs["input_ids"], inputs["attention_mask"], preprocessor.visual_ids)
    (n_text,), (n_visual,) = types.n_text, types.n_visual
    if bool(images) != bool(n_visual):
        message = f"{len(images)} images became {n_visual} visual tokens; does the chat template place images?"
        raise SampleError("tokenise", "visual-tokens", message)
    if n_text + n_visual > preprocessor.context:
        message = f"{n_text} text and {n_visual} visual tokens exceed the model's context of {preprocessor.context}"
        raise SampleError("tokenise", "context", message)
    seen = images_of(preprocessor.family, inputs)
    return EncodedPrompt(inputs=inputs, images=seen, n_text=n_text, n_visual=n_visual)


def join(
    preprocessor: Preprocessor,
    encoded: Sequence[EncodedPrompt],
    *,
    padding_side: PaddingSide | None = None,
    pixels: bool = True,
) -> Batch:
    """Pad encoded prompts to one batch, as the processor would have encoded them together.

    Args:
        padding_side: the processor's own unless given; generation needs the left.
        pixels: without them `pixel_values` has no content: for `VisionCache.reusing`, which has the images.
    """
    lengths = [one.inputs["input_ids"].shape[1] for one in encoded]
    left = (padding_side or _padding_side(preprocessor)) == "left" if len(set(lengths)) > 1 else True
    sides = [(max(lengths) - length, 0) if left else (0, max(lengths) - length) for length in lengths]
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in encoded for name in one.inputs):
        if name == "pixel_values" and not pixels:
            inputs[name] = torch.empty(1)
        elif name in PIXEL_INPUTS:
            inputs[name] = _joined_pixels(preprocessor.family, name, encoded)
        else:
            fill = (preprocessor.processor.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
            padded = [pad(one.inputs[name], side, value=fill) for one, side in zip(encoded, sides, strict=True)]
            inputs[name] = torch.cat(padded)
    if preprocessor.family.positions_from_mask:
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    types = token_types(inputs["input_ids"], inputs["attention_mask"], preprocessor.visual_ids)
    return Batch(inputs=inputs, types=types, images=tuple(image for one in encoded for image in one.images))


def _padding_side(preprocessor: Preprocessor) -> PaddingSide:
    """Find out on which side the processor pads: some have a default that is not their tokenizer's."""
    mask_BT = preprocessor.processor(text=["a", "a a"], padding=True, return_tensors="pt")["attention_mask"]
    return "right" if mask_BT[0, 0] else "left"


def _joined_pixels(family: Family, name: str, encoded: Sequence[EncodedPrompt]) -> Tensor:
    parts = [one.inputs.get(name) for one in encoded]
    found = [part for part in parts if part is not None]
    if family.pixels == "nested":
        # A row for each prompt, also for those without images.
        empty = found[0].new_zeros(1, 0, *found[0].shape[2:])
        found = [empty if part is None else part for part in parts]
    return stacked(found)


def positions_of(mask_BT: Tensor) -> Tensor:
    """Return position ids (B, T) that count the tokens of an attention mask; padding on the left is at position 0."""
    return (mask_BT.cumsum(1) - 1).clamp(min=0)


def adds_special_tokens(preprocessor: Preprocessor, text: str) -> bool:
    """Tell whether the tokenizer has to add special tokens: not where the template has written the first one."""
    bos = preprocessor.processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def preprocess(preprocessor: Preprocessor, samples: Sequence[Sample]) -> Encoded:
    """Encode samples into one padded batch in CPU memory; one that cannot be used is an error of its own."""
    errors: list[tuple[Sample, SampleError]] = []
    usable: list[tuple[Sample, EncodedPrompt]] = []
    for sample in samples:
        try:
            usable.append((sample, encode_one(preprocessor, prompt_of(preprocessor, [message_of(sample)]))))
        except SampleError as error:
            errors.append((sample, error))
    batch = join(preprocessor, [one for _, one in usable]) if usable else None
    return Encoded(batch=batch, samples=tuple(sample for sample, _ in usable), errors=tuple(errors))


def encode(loaded: LoadedModel, samples: Sequence[Sample]) -> Encoded:
    """Encode samples as `preprocess` does, with the batch on the model's device."""
    encoded = preprocess(loaded, samples)
    return replace(encoded, batch=encoded.batch.on(loaded) if encoded.batch else None)
