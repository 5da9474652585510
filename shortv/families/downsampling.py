"""Smaller images for the full model, as a control: what a plan saves in layers is saved in pixels instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Final

from PIL import Image
from torch import Tensor

from shortv.architecture import Architecture
from shortv.costs import visual_tokens_at
from shortv.families.preprocessing import Batch, Preprocessor, Prompt, batch_of

_LEAST_SIDE: Final = 16
"""Pixels of about one patch; no image becomes smaller."""
_NEAR: Final = 1.05
_MOST_STEPS: Final = 12


def downsampled(preprocessor: Preprocessor, prompt: Prompt, share: float, architecture: Architecture) -> Prompt:
    """Return a prompt with images so much smaller that its prefill, without a continuation, takes this share of FLOPs.

    Images keep their shape. Where their size decides the number of visual tokens, they shrink until there are as few
    as the share allows. Where it does not (LLaVA-1.5), no FLOPs are saved, and the images hold as many pixels as so
    few tokens would show.

    Raises:
        SampleError: as `batch_of`.
    """
    if not prompt.images:
        return prompt
    # Continuations of one prompt must see the same images.
    whole = batch_of(preprocessor, [replace(prompt, continuation="")])
    n_text, n_visual = whole.types.n_text[0], whole.types.n_visual[0]
    wanted = max(1.0, visual_tokens_at(architecture, share, n_text, n_visual))

    def visual_tokens(found: Prompt) -> int:
        return batch_of(preprocessor, [found]).types.n_visual[0]

    if visual_tokens(_scaled(prompt, 0.0)) >= n_visual:
        return _scaled(prompt, sqrt(wanted / n_visual), _seen(prompt.images, whole))
    # The processor may shrink large images itself, and tiles come in few sizes: one step is not always enough.
    found, side, count = prompt, 1.0, n_visual
    for _ in range(_MOST_STEPS):
        if count <= _NEAR * wanted:
            break
        side *= sqrt(wanted / count)
        found = _scaled(prompt, side)
        count = visual_tokens(found)
    return found


def _seen(images: Sequence[Image.Image], batch: Batch) -> list[float]:
    """Return by how much a processor shrinks the sides of each image to the pixels that the vision tower sees."""
    pixels: Tensor = batch.inputs["pixel_values"]
    area = pixels.numel() / 3 / len(images)
    # An image fills a square with its shorter side, which may cut off the rest of it, or fills several tiles.
    sides = (max(pixels.shape[-1] / min(image.size), sqrt(area / (image.width * image.height))) for image in images)
    return [min(1.0, side) for side in sides]


def _scaled(prompt: Prompt, side: float, seen: Sequence[float] | None = None) -> Prompt:
    """Return the prompt with the sides of each image scaled by this factor, times the image's own factor."""
    factors = seen or [1.0] * len(prompt.images)
    images = [_resized(image, side * factor) for image, factor in zip(prompt.images, factors, strict=True)]
    return replace(prompt, images=tuple(images))


def _resized(image: Image.Image, side: float) -> Image.Image:
    side = min(1.0, max(side, _LEAST_SIDE / min(image.size)))
    # Pillow filters what it shrinks (antialiasing).
    return image.resize([max(1, round(size * side)) for size in image.size], Image.Resampling.BICUBIC)
