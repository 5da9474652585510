"""The memory that the decoded images of a replica's questions take together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shortv.errors import SampleError
from shortv.request import Message
from shortv.untrusted import image_size

_BYTES_PER_PIXEL = 3  # RGB


class ImageRoom:
    """Bounds the images that are decoded at a time. For one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        """Bytes that are taken now."""
        self._max_bytes = max_bytes

    @contextmanager
    def taken(self, turns: Sequence[Message]) -> Iterator[bool]:
        """Take the room that the images need inside the block; tells whether there is any.

        However large they are, they may be decoded while no others are.
        """
        size = sum(_decoded_bytes(part) for turn in turns for part in turn.parts)
        fits = not size or not self.held or self.held + size <= self._max_bytes
        taken = size if fits else 0
        self.held += taken
        try:
            yield fits
        finally:
            self.held -= taken


def _decoded_bytes(part: object) -> int:
    try:
        width, height = image_size(part) if isinstance(part, bytes) else getattr(part, "size", (0, 0))
    except SampleError:  # decoding it fails with the same error
        return 0
    return int(width * height * _BYTES_PER_PIXEL)
