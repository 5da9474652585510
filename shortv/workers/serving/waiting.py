"""Reading a request within bounds, and waiting for an answer only as long as somebody waits for it too."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive

from shortv.workers.serving.rejection import Rejected, client_gone

T = TypeVar("T")


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """Read a body of at most `limit` bytes, whatever its length is said to be. Raises Rejected."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _too_long(limit)
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise client_gone()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_long(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_long(limit: int) -> Rejected:
    problem = f"the body is longer than the {limit} bytes that are allowed; send smaller or fewer images"
    # The rest of the body is not wanted, so the connection cannot carry another request.
    return Rejected(413, problem, code="body_too_large", headers=[(b"connection", b"close")])


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Await some work and cancel it when the client goes away or the caller is cancelled.

    The work has ended, clean-up included, when this returns or raises. The body must have been read before.

    Raises:
        Rejected: the client went away.
    """
    worker, watcher = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            watcher.result()
            raise client_gone()
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
