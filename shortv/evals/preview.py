"""What a page shows of a document: its question as text, and its images as one small picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from shortv.request import Message
from shortv.untrusted import open_image

MAX_SIDE: Final = 128
"""Longest side of the picture, in pixels."""
MAX_BYTES: Final = 3_000
"""About how large the picture is at most: its quality is lowered until it fits."""
_QUALITIES: Final = (80, 60, 40, 25)
_MAX_IMAGES: Final = 4
_MAX_CHARACTERS: Final = 2_000


class Preview(NamedTuple):
    """A document's question, and its images as one JPEG file; None for a document without an image."""

    question: str
    image: bytes | None


def preview(messages: Sequence[Message]) -> Preview:
    """Return what a page shows of a prompt: the text of its last user message, and its first images.

    Images are encoded files, arrays `(height, width, 3)` of uint8, or Pillow images. Raises SampleError for an image
    that cannot be read.
    """
    texts = [[part for part in one.parts if isinstance(part, str)] for one in messages if one.role == "user"]
    question = "\n".join(texts[-1]).strip() if texts else ""
    return Preview(
        question if len(question) <= _MAX_CHARACTERS else f"…{question[1 - _MAX_CHARACTERS :]}",
        thumbnail(part for one in messages for part in one.parts if not isinstance(part, str)),
    )


def thumbnail(images: Iterable[Any]) -> bytes | None:
    """Return images as one small JPEG file: the first four of them, two in a row. None without an image."""
    first = [image for image, _ in zip(images, range(_MAX_IMAGES), strict=False)]
    if not first:
        return None
    columns = math.ceil(math.sqrt(len(first)))
    small = [_small(image, MAX_SIDE // columns) for image in first]
    width, height = (max(image.size[axis] for image in small) for axis in (0, 1))
    rows = math.ceil(len(small) / columns)
    picture = Image.new("RGB", (width * columns, height * rows), "white")
    for place, image in enumerate(small):
        picture.paste(image, (place % columns * width, place // columns * height))
    for quality in _QUALITIES:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= MAX_BYTES:
            break
    return stream.getvalue()


def _small(image: Any, side: int) -> Image.Image:
    whole = Image.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
    whole.thumbnail((side, side))
    return whole
