"""The downsampled control: fewer visual tokens where an image's size decides their number, less detail where not."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shortv.costs import layer_flops
from shortv.families import LoadedModel
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import Batch, Prompt, batch_of, message_of, prompt_of
from shortv.plan import Mode
from shortv.sample import Sample
from tests.processors import CHECKPOINTS, loaded_checkpoint
from tests.tiny_model import bundled


def noise(width: int, height: int) -> bytes:
    """A PNG of noise, which has all the detail that its pixels can have."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def smaller(loaded: LoadedModel, share: float, *images: bytes) -> tuple[Prompt, list[Batch]]:
    """Return a prompt of these images downsampled, and its batch before and after."""
    prompt = prompt_of(loaded, [message_of(Sample(sample_id="a", prompt="How many?", images=images))])
    found = downsampled(loaded, prompt, share, loaded.architecture)
    return found, [batch_of(loaded, [one]) for one in (prompt, found)]


def flops(loaded: LoadedModel, batch: Batch) -> float:
    return layer_flops(loaded.architecture, Mode.FULL, batch.types.n_text[0], batch.types.n_visual[0])


# Images below and above the most pixels that the processor leaves as they are.
@pytest.mark.parametrize("sizes", [((160, 96),), ((60, 120), (100, 64)), ((600, 400),)])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_where_the_number_of_tokens_depends_on_the_image_flops_fall(
    share: float, sizes: tuple[tuple[int, int], ...]
) -> None:
    loaded = loaded_checkpoint("Qwen2VLProcessor")
    loaded = replace(loaded, processor=deepcopy(loaded.processor))
    loaded.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 160 * 160}
    _, (whole, found) = smaller(loaded, share, *(noise(*size) for size in sizes))
    assert flops(loaded, found) / flops(loaded, whole) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("size", [(120, 60), (1200, 600)])
def test_where_it_does_not_images_lose_detail(size: tuple[int, int]) -> None:
    """The bundled model sees 60 x 60 pixels of any image, as 36 tokens."""
    found, batches = smaller(bundled(), 0.5, noise(*size))
    assert [batch.types.n_visual for batch in batches] == [[36], [36]]
    width, height = found.images[0].size
    assert width / height == pytest.approx(2, rel=0.05) and 16 < height < 60 * 0.75
    detail = [batch.inputs["pixel_values"].diff().abs().mean() for batch in batches]
    assert detail[1] < 0.8 * detail[0]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_takes_the_smallest_images(name: str) -> None:
    found, (whole, least) = smaller(loaded_checkpoint(name), 1e-6, noise(64, 48), noise(90, 8))
    assert found.images[1].size == (90, 8) and min(found.images[0].size) >= 16
    assert 0 < least.types.n_visual[0] <= whole.types.n_visual[0]
    assert all(torch.isfinite(value).all() for value in least.inputs.values())


def test_continuations_of_a_prompt_see_the_same_images() -> None:
    prompt = prompt_of(bundled(), [message_of(Sample(sample_id="a", prompt="How many?", images=(noise(60, 60),)))])
    longer = replace(prompt, continuation="a long answer, so that the share of the image is small")
    less, least = (downsampled(bundled(), one, 0.5, bundled().architecture) for one in (prompt, longer))
    assert less.images == least.images and least.continuation == longer.continuation


def test_a_prompt_without_images_stays_as_it_is() -> None:
    prompt = prompt_of(bundled(), [message_of(Sample(sample_id="a", prompt="How many?"))])
    assert downsampled(bundled(), prompt, 0.5, bundled().architecture) is prompt
