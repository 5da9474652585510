"""Answers of the service: files in chunks, and one line about whatever goes wrong."""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from reports.http import HttpError
from reports.service.conditions import Span, names_tag, span_of
from reports.service.files import CHUNK, read_exactly
from reports.service.trees import Opened


def json_reply(value: Any) -> Response:
    """Return a JSON-like value; texts from a manifest may hold what UTF-8 cannot, so it is ASCII."""
    headers = {"vary": "Accept", "cache-control": "private, no-cache"}
    return Response(json.dumps(value, allow_nan=False) + "\n", headers=headers, media_type="application/json")


class FileReply(StreamingResponse):
    """A file, or a range of it, a chunk at a time; the file is closed at the end, however it comes."""

    def __init__(self, opened: Opened, span: Span, status: int, headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(_chunks(opened, span), status, dict(headers), media_type)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await run_in_threadpool(self._opened.close)


async def _chunks(opened: Opened, span: Span) -> AsyncIterator[bytes]:
    start = span.start
    while start < span.stop:
        count = min(CHUNK, span.stop - start)
        chunk = await run_in_threadpool(partial(read_exactly, opened, start, count))
        start += count
        # Before its end: a client counts the bytes, and so learns that it does not have the file.
        if start == span.stop and await run_in_threadpool(opened.changed):
            raise OSError(None, "the file was replaced while it was sent")
        yield chunk


def file_reply(request: Request, opened: Opened, digest: bytes, *, media_type: str, filename: str) -> Response:
    """Answer with an open file as the request's conditions say, and take care that it is closed."""
    etag, encoded = f'"{digest.hex()}"', base64.b64encode(digest).decode()
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
    full = headers | {
        "repr-digest": f"sha-256=:{encoded}:",
        # The older form of the same, which some download tools check.
        "digest": f"sha-256={encoded}",
        "content-disposition": _disposition(filename),
    }
    asked, size = request.headers, opened.size
    if "if-match" in asked and not names_tag(asked["if-match"], etag, weak=False):
        opened.close()
        raise HttpError(412, "the file is not the one that If-Match names", code="changed", headers=_raw(headers))
    if "if-none-match" in asked and names_tag(asked["if-none-match"], etag, weak=True):
        opened.close()
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        opened.close()
        return Response(headers=full | {"content-length": str(size)}, media_type=media_type)
    span = span_of(asked.get("range"), size)
    if span is None or asked.get("if-range", etag) != etag:
        return FileReply(opened, Span(0, size), 200, full | {"content-length": str(size)}, media_type)
    if span.start == span.stop:
        opened.close()
        where = _raw({**headers, "content-range": f"bytes */{size}"})
        problem = f"the file has {size} bytes, and none of them is in this range"
        raise HttpError(416, problem, code="no_such_range", headers=where)
    part = {"content-range": f"bytes {span.start}-{span.stop - 1}/{size}"}
    part["content-length"] = str(span.stop - span.start)
    return FileReply(opened, span, 206, full | part, media_type)


def _disposition(filename: str) -> str:
    plain = filename.encode("ascii", errors="replace").decode().replace('"', "_").replace("\\", "_").replace("?", "_")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
