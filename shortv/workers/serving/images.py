"""Images of a request: data URIs whose format and size are known before a pixel is decoded."""

from __future__ import annotations

import binascii
import io
import re
from typing import NamedTuple

from PIL import Image

from shortv.workers.serving.rejection import Rejected

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# As Qwen's processors have it. One that fits the shorter side to N pixels makes at most 200 N² of such an image; of a
# longer strip it would make gigabytes.
_MOST_ELONGATED = 200


class ImageSize(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class ImageReader:
    """Reads the images of one request, which share a number of pixels."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._pixels = 0

    def read(self, url: str, *, param: str) -> bytes:
        """Return the encoded image of a data URI, after a look at its header.

        Raises:
            Rejected: it is another kind of URL (nothing is ever fetched), is damaged, has too many pixels, alone or
                with the images before it, or is too long for its width.
        """
        data = _data(url, param)
        try:
            size = size_of(data, formats=FORMATS)
        except _BOMBS:
            raise self._too_many("far too many", param) from None
        except Exception:  # a hostile file can make Pillow raise anything, and each means the same
            problem = f"{param} is not a readable image; send one of {', '.join(FORMATS)}"
            raise Rejected(400, problem, param=param, code="invalid_image") from None
        self._pixels += size.width * size.height
        if self._pixels > self._max_pixels:
            raise self._too_many(f"{size.width} x {size.height}", param)
        if max(size) > _MOST_ELONGATED * min(size):
            problem = f"one side may be {_MOST_ELONGATED} times the other at most; crop it"
            raise _too_large(f"{param} has {size.width} x {size.height} pixels, and {problem}", param)
        return data

    def _too_many(self, found: str, param: str) -> Rejected:
        allowed = f"{self._max_pixels} are allowed for all images of a request together"
        return _too_large(f"{param} has {found} pixels, and {allowed}; scale it down", param)


def size_of(data: bytes, *, formats: tuple[str, ...] | None = None) -> ImageSize:
    """Read the size of an encoded image from its header; raises whatever Pillow raises."""
    with Image.open(io.BytesIO(data), formats=formats) as image:
        return ImageSize(*image.size)


def _data(url: str, param: str) -> bytes:
    found = _DATA_URI.match(url)
    if found is None:
        raise Rejected(400, f"{param} {_what_else(url)}; send data:image/png;base64,...", param=param)
    try:
        return binascii.a2b_base64(memoryview(url.encode("ascii"))[found.end() :], strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        problem = f"{param} is not valid base64; encode the file with the standard alphabet"
        raise Rejected(400, problem, param=param) from None


def _what_else(url: str) -> str:
    scheme = _SCHEME.match(url)
    if scheme is None:
        return "is not a data URI of an image"
    name = scheme.group().lower()
    return "is a data URI, but not of a base64 image" if name == "data:" else f"is a {name} URL, which is never fetched"


def _too_large(problem: str, param: str) -> Rejected:
    return Rejected(400, problem, param=param, code="image_too_large")
