"""From messages to model inputs: images, the processor's chat template, tokens and padding. Needs no weights.

Sweeps, replicas, the model in one process and training all prepare their prompts here:
`Sample` -> `Message` (`message_of`) -> `Prompt` (`prompt_of`) -> `Batch` (`batch_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from torch import Tensor

from shortv.errors import SampleError, one_line
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
class Batch:
    """A padded batch: keyword arguments for the model, and the type of each position."""

    inputs: dict[str, Tensor]
    types: TokenTypes

    def on(self, loaded: LoadedModel) -> Batch:
        """Return the batch on the model's device, pixels in the model's dtype."""
        dtype = loaded.model.dtype
        moved = {
            name: value.to(loaded.device, dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }
        return Batch(inputs=moved, types=self.types.on(loaded.device))


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

    Some processors take prompts with images or prompts without, not both at once.

    Args:
        padding_side: the tokenizer's own unless given; generation needs the left.

    Raises:
        SampleError: the processor fails on a prompt, images became no visual tokens, or a prompt exceeds the model's
            context. To find out which one, encode each alone.
    """
    texts = [prompt.text + prompt.continuation for prompt in prompts]
    # One list per prompt, as the processors' own apply_chat_template passes them: LLaVA-OneVision tiles an image only
    # where it is a prompt's only one, and Gemma 3 takes a flat list for the images of one prompt.
    images = [list(prompt.images) for prompt in prompts]
    try:
        encoded: Any = preprocessor.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(preprocessor, texts[0]),
            **({"padding_side": padding_side} if padding_side else {}),
        )
    except Exception as error:  # processors raise whatever their libraries raise on odd sizes and texts
        raise SampleError("tokenise", type(error).__name__, one_line(error, limit=500)) from error
    inputs: dict[str, Tensor] = dict(encoded)
    types = token_types(inputs["input_ids"], inputs["attention_mask"], preprocessor.visual_ids)
    for own, n_text, n_visual in zip(images, types.n_text, types.n_visual, strict=True):
        if bool(own) != bool(n_visual):
            message = f"{len(own)} images became {n_visual} visual tokens; does the chat template place images?"
            raise SampleError("tokenise", "visual-tokens", message)
        if n_text + n_visual > preprocessor.context:
            message = f"{n_text} text and {n_visual} visual tokens exceed the model's context of {preprocessor.context}"
            raise SampleError("tokenise", "context", message)
    if preprocessor.family.positions_from_mask:
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    return Batch(inputs=inputs, types=types)


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
    usable: list[tuple[Sample, Prompt]] = []
    for sample in samples:
        try:
            usable.append((sample, prompt_of(preprocessor, [message_of(sample)])))
        except SampleError as error:
            errors.append((sample, error))
    batch = None
    try:
        batch = batch_of(preprocessor, [prompt for _, prompt in usable]) if usable else None
    except SampleError:
        faults = [_fault(preprocessor, prompt) for _, prompt in usable]
        errors += [(sample, fault) for (sample, _), fault in zip(usable, faults, strict=True) if fault]
        usable = [pair for pair, fault in zip(usable, faults, strict=True) if not fault]
        batch = batch_of(preprocessor, [prompt for _, prompt in usable]) if usable else None
    return Encoded(batch=batch, samples=tuple(sample for sample, _ in usable), errors=tuple(errors))


def _fault(preprocessor: Preprocessor, prompt: Prompt) -> SampleError | None:
    try:
        batch_of(preprocessor, [prompt])
    except SampleError as error:
        return error
    return None


def encode(loaded: LoadedModel, samples: Sequence[Sample]) -> Encoded:
    """Encode samples as `preprocess` does, with the batch on the model's device."""
    encoded = preprocess(loaded, samples)
    return replace(encoded, batch=encoded.batch.on(loaded) if encoded.batch else None)
