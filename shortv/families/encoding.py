"""From samples to model inputs: one user turn through the processor's own chat template, then the generation prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortv.chat import Turn
from shortv.errors import SampleError
from shortv.families.loading import LoadedModel
from shortv.families.prompts import Batch, Prompt, batch_of, prompt_of
from shortv.sample import Sample

IMAGE_MARKER = "<image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The samples of a batch that could be encoded, on the model's device, and those that could not."""

    batch: Batch | None
    samples: tuple[Sample, ...]
    errors: tuple[tuple[Sample, SampleError], ...]


def encode(loaded: LoadedModel, samples: Sequence[Sample]) -> Encoded:
    """Encode samples into one padded batch; a bad sample becomes an error and never takes a good one with it."""
    errors: list[tuple[Sample, SampleError]] = []
    prompts: list[tuple[Sample, Prompt]] = []
    for sample in samples:
        try:
            prompts.append((sample, prompt_of(loaded, [turn_of(sample)])))
        except SampleError as error:
            errors.append((sample, error))
    try:
        batch = _batch(loaded, prompts)
    except SampleError:
        faults = [(sample, _fault(loaded, prompt)) for sample, prompt in prompts]
        errors += [(sample, fault) for sample, fault in faults if fault]
        prompts = [kept for kept, (_, fault) in zip(prompts, faults, strict=True) if not fault]
        batch = _batch(loaded, prompts)
    return Encoded(batch=batch, samples=tuple(sample for sample, _ in prompts), errors=tuple(errors))


def _batch(loaded: LoadedModel, prompts: Sequence[tuple[Sample, Prompt]]) -> Batch | None:
    if not prompts:
        return None
    batch = batch_of(loaded, [prompt for _, prompt in prompts])
    if loaded.decoder.family.positions_from_mask:
        batch.inputs["position_ids"] = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch.on(loaded)


def _fault(loaded: LoadedModel, prompt: Prompt) -> SampleError | None:
    try:
        batch_of(loaded, [prompt])
    except SampleError as error:
        return error
    return None


def turn_of(sample: Sample) -> Turn:
    """A sample as one user turn: its prompt split at the image markers; without markers the images come first.

    Raises:
        SampleError: there are not as many markers as images.
    """
    pieces = sample.prompt.split(IMAGE_MARKER)
    markers, images = len(pieces) - 1, list(sample.images)
    if markers == 0:
        return Turn(role="user", parts=(*images, sample.prompt))
    if markers != len(images):
        message = f"the prompt has {markers} {IMAGE_MARKER} markers but the sample has {len(images)} images"
        raise SampleError(stage="prompt", error="image-count", message=message)
    parts: list[str | bytes] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(images[number - 1])
        if piece.strip():
            parts.append(piece.strip("\n"))
    return Turn(role="user", parts=tuple(parts))
