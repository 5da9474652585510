"""Sending one open file: entity tags, conditions and ranges, for local files and for stores."""

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Final, NamedTuple
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from reports.http import HttpError
from reports.service.tree import OpenFile

CHUNK: Final = 2**20
# A number with more digits than any file has bytes makes the header malformed.
_RANGE: Final = re.compile(r"bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", re.IGNORECASE)


class Span(NamedTuple):
    """The bytes from `start` up to, but not including, `stop`; an empty span cannot be satisfied."""

    start: int
    stop: int


def span_of(header: str | None, size: int) -> Span | None:
    """Return the range that a Range header requests; None is the whole file.

    Several ranges, other units and malformed headers mean the whole file, as RFC 9110 allows.
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
    """Return whether a list of entity tags contains this strong one; in weak comparison `W/"x"` equals `"x"`."""
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or etag in ([tag.removeprefix("W/") for tag in tags] if weak else tags)


def file_response(request: Request, opened: OpenFile, *, media_type: str, filename: str) -> Response:
    """Return the response to a request for an open file, which the response closes.

    The entity tag names the version of the file (inode, size and time of change, or what the store says), so that the
    first byte is sent without reading the whole file. Raises HttpError for conditions and ranges that fail.
    """
    size, requested = opened.entry.size, request.headers
    etag = f'"{hashlib.sha256(opened.entry.version.encode()).hexdigest()[:32]}"'
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
    if "if-match" in requested and not names_tag(requested["if-match"], etag, weak=False):
        raise HttpError(412, "the file is not the one that If-Match names", code="changed", headers=_raw(headers))
    if "if-none-match" in requested and names_tag(requested["if-none-match"], etag, weak=True):
        opened.stream.close()
        return Response(status_code=304, headers=headers)
    span = span_of(requested.get("range"), size)
    if request.method == "HEAD" or requested.get("if-range", etag) != etag:
        span = None
    if span is not None and span.start == span.stop:
        problem = f"the file has {size} bytes, and none of them is in this range"
        raise HttpError(
            416, problem, code="no_such_range", headers=_raw(headers | {"content-range": f"bytes */{size}"})
        )
    plain = re.sub(r'["\\?]', "_", filename.encode("ascii", errors="replace").decode())
    named = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
    headers |= {"content-type": media_type, "content-disposition": named}
    if opened.status is not None:
        return _LocalResponse(opened, span, headers)
    return _StoreResponse(opened, span, headers, head=request.method == "HEAD")


class _LocalResponse(FileResponse):
    """A file that was opened below the root; its name may belong to another file by now."""

    def __init__(self, opened: OpenFile, span: Span | None, headers: Mapping[str, str]) -> None:
        # This path is the open file itself, whatever its name stands for.
        super().__init__(f"/dev/fd/{opened.stream.fileno()}", headers=headers, stat_result=opened.status)
        self._opened = opened
        self._range = [(b"range", f"bytes={span.start}-{span.stop - 1}".encode())] if span is not None else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        kept = [item for item in scope["headers"] if item[0] not in (b"range", b"if-range")]
        with self._opened.stream:
            await super().__call__({**scope, "headers": kept + self._range}, receive, send)


class _StoreResponse(StreamingResponse):
    """A file in a store, read a chunk at a time."""

    def __init__(self, opened: OpenFile, span: Span | None, headers: Mapping[str, str], *, head: bool) -> None:
        start, stop = span or Span(0, opened.entry.size)
        own = {**headers, "content-length": str(stop - start)}
        if span is not None:
            own["content-range"] = f"bytes {start}-{stop - 1}/{opened.entry.size}"
        body = _chunks(opened, Span(start, start if head else stop))
        super().__init__(body, 206 if span is not None else 200, own)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await run_in_threadpool(self._opened.stream.close)


async def _chunks(opened: OpenFile, span: Span) -> AsyncIterator[bytes]:
    for start in range(span.start, span.stop, CHUNK):
        count = min(CHUNK, span.stop - start)
        chunk = await run_in_threadpool(opened.stream.read_at, count, start)
        # Checked before the last chunk: a client counts the bytes, and so learns that the download failed.
        if len(chunk) < count or (start + count == span.stop and await run_in_threadpool(opened.changed)):
            raise OSError(None, "the file was replaced while it was sent")
        yield bytes(chunk)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
