"""`photos_vqa`: an lmms-eval task of photograph-like JPEG files, made when it is needed and not shipped.

A photo is noise with the 1/f spectrum of natural images, lit from one side, with a scene of `shortv.tiny.scenes` across
its height: reading, decoding and sending it costs what a photograph of this size costs, and its questions are those of
`shapes_vqa`. The functions here are those that the task's YAML file names.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from shortv.tiny.dataset import training_samples
from shortv.tiny.questions import KINDS
from shortv.tiny.scenes import Pixels, Scene, render

SMALL, LARGE = (640, 480), (1344, 1008)
"""Sizes of photographs, width and height."""
_QUALITY = 75
_FIELDS = 4
# Standard deviations of brightness, around the scene and on it.
_CONTRAST, _TEXTURE = 48.0, 8.0
_TASK = """\
include: {shapes}
task: {name}
dataset_kwargs:
  data_files:
    test: {name}.parquet
doc_to_visual: !function shortv.tiny.photos.doc_to_visual
doc_to_messages: !function shortv.tiny.photos.doc_to_messages
"""


def make_photos_vqa(
    folder: str | Path, *, n: int = 500, size: tuple[int, int] = SMALL, seed: int = 0, name: str = "photos_vqa"
) -> Path:
    """Write the task's YAML file and its data, and return the folder, for `--include-path`.

    Args:
        size: width and height in pixels; a photo of 640x480 has 45 to 60 kB.
        name: name of the task; tasks of different names may share a folder.
    """
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {column: Value("string") for column in ("sample_id", "prompt", "answer", "kind")}
    schema = Features({**texts, "image": ImageFeature()}).arrow_schema
    with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
        for rows in _batches(n, size, seed, name):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    shapes = Path(__file__).parent / "task" / "shapes_vqa.yaml"
    (folder / f"{name}.yaml").write_text(_TASK.format(shapes=shapes, name=name), "utf-8")
    return folder


def _batches(n: int, size: tuple[int, int], seed: int, name: str, rows: int = 100) -> Iterator[list[dict[str, Any]]]:
    samples = training_samples(KINDS, n, seed=seed, split="benchmark")
    photos = _Photos(size, seed)
    for start in range(0, n, rows):
        yield [
            {
                "sample_id": f"{name}-{start + at:05d}",
                "prompt": sample.turn.prompt,
                "answer": sample.turn.answer,
                "kind": sample.turn.kind,
                "image": {"bytes": photos.jpeg(sample.scene), "path": None},
            }
            for at, sample in enumerate(samples[start : start + rows])
        ]


class _Photos:
    """Draws photos of one size. The noise is periodic, so that each photo is a shift of few fields of it."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self._size, self._rng = size, random.Random(f"{seed}-photos")
        noise = np.random.default_rng(seed)
        self._fields = [_natural_noise(noise, size) for _ in range(_FIELDS)]

    def jpeg(self, scene: Scene) -> bytes:
        """Return a photo as a JPEG file."""
        width, height = self._size
        rng = self._rng
        shift = (rng.randrange(height), rng.randrange(width))
        field_HW = np.roll(rng.choice(self._fields), shift, (0, 1))
        light_W = np.linspace(-1, 1, width, dtype=np.float32) * rng.uniform(-40, 40)
        # A table gives each brightness its colour, which takes a third of the time of products per channel.
        tint = np.array([rng.uniform(0.7, 1.1) for _ in range(3)])
        colours = _bytes(np.arange(256)[:, None] * tint)
        pixels_HWC = colours[_bytes(_CONTRAST * field_HW + light_W + 120)]
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        square = slice(top, top + side), slice(left, left + side)
        drawn_HWC = np.asarray(Image.fromarray(render(scene)).resize((side, side), Image.Resampling.NEAREST))
        texture_HW1 = (_TEXTURE * field_HW[square]).astype(np.int16)[..., None]
        pixels_HWC[square] = _bytes(drawn_HWC + texture_HW1)
        stream = io.BytesIO()
        Image.fromarray(pixels_HWC).save(stream, "JPEG", quality=_QUALITY)
        return stream.getvalue()


def _bytes(values: NDArray[Any]) -> Pixels:
    return np.asarray(np.clip(values, 0, 255), np.uint8)


def _natural_noise(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Noise of height x width whose amplitude falls with the frequency, of mean 0 and deviation 1."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / np.maximum(frequency, 1 / max(size))
    spectrum[0, 0] = 0
    field_HW = np.fft.irfft2(spectrum, (height, width))
    return np.asarray(field_HW / field_HW.std(), np.float32)


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Give the document's photo."""
    return [doc["image"].convert("RGB")]


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the document as one user message: its photo, then the question."""
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": doc["prompt"]}]
    return [{"role": "user", "content": content}]
