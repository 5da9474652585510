"""What a client asks of a file beside its name: a range of bytes, or nothing if it has the file already."""

import re
from typing import Final, NamedTuple

# More digits than any file has bytes: such a range is no range.
_RANGE: Final = re.compile(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", re.IGNORECASE)


class Span(NamedTuple):
    """Bytes from `start` up to, and not with, `stop`; an empty one cannot be satisfied."""

    start: int
    stop: int


def span_of(header: str | None, size: int) -> Span | None:
    """Return the range that a Range header asks of a file; None means the whole file.

    Several ranges, other units and malformed headers are no reason to fail: RFC 9110 lets a server ignore them.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return Span(max(size - int(match[2]), 0), size) if int(match[2]) else Span(0, 0)
    start = int(match[1])
    stop = min(int(match[2]) + 1, size) if match[2] else size
    if match[2] and int(match[2]) < start:
        return None
    return Span(start, stop) if start < size else Span(0, 0)


def names_tag(header: str, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags holds this strong one; compared weakly `W/"x"` is `"x"`."""
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or etag in ([tag.removeprefix("W/") for tag in tags] if weak else tags)
