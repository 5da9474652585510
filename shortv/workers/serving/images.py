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


class ImageSize(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


def read_image(url: str, *, param: str, max_pixels: int) -> bytes:
    """Return the encoded image of a data URI, after a look at its header.

    Raises:
        Rejected: it is another kind of URL (nothing is ever fetched), is damaged, or has too many pixels.
    """
    found = _DATA_URI.match(url)
    if found is None:
        raise Rejected(400, f"{param} {_what_else(url)}; send data:image/png;base64,...", param=param)
    try:
        data = binascii.a2b_base64(memoryview(url.encode("ascii"))[found.end() :], strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        problem = f"{param} is not valid base64; encode the file with the standard alphabet"
        raise Rejected(400, problem, param=param) from None
    size = _size(data, param, max_pixels)
    if size.width * size.height > max_pixels:
        raise _too_large(f"{size.width} x {size.height}", param, max_pixels)
    return data


def _what_else(url: str) -> str:
    scheme = _SCHEME.match(url)
    if scheme is None:
        return "is not a data URI of an image"
    name = scheme.group().lower()
    return "is a data URI, but not of a base64 image" if name == "data:" else f"is a {name} URL, which is never fetched"


def _size(data: bytes, param: str, max_pixels: int) -> ImageSize:
    try:
        # Pillow reads the header here; pixels only when they are asked for.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return ImageSize(*image.size)
    except _BOMBS:
        raise _too_large("far too many", param, max_pixels) from None
    except Exception:  # a hostile file can make Pillow raise anything, and each means the same
        problem = f"{param} is not a readable image; send one of {', '.join(FORMATS)}"
        raise Rejected(400, problem, param=param, code="invalid_image") from None


def _too_large(found: str, param: str, allowed: int) -> Rejected:
    problem = f"{param} has {found} pixels, and {allowed} are allowed; scale it down"
    return Rejected(400, problem, param=param, code="image_too_large")
