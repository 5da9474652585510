"""An answer that is sent while it is made, as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shortv.request import Chunk, Completion, Failure
from shortv.workers.serving.openai_answers import AnswerForm
from shortv.workers.serving.rejection import Rejected, rejection_of, too_late
from shortv.workers.serving.settings import EndpointSettings
from shortv.workers.serving.waiting import unless_gone

Item = Chunk | Completion | Failure
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends the pieces of an answer; the status waits for the first one, so that early failures have theirs."""

    def __init__(
        self,
        ask: Callable[[], AsyncIterator[Item]],
        form: AnswerForm,
        settings: EndpointSettings,
        *,
        include_usage: bool,
    ) -> None:
        """Take what asks the replicas; it is called when the sending begins."""
        super().__init__()
        self._ask = ask
        self._form = form
        self._settings = settings
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; raises Rejected for a failure, before or after the first piece."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await unless_gone(self._send_all(send), receive)
        except TimeoutError:
            raise too_late(self._settings.timeout_s) from None

    async def _send_all(self, send: Send) -> None:
        items = self._ask()
        try:
            started = False
            async for item in items:
                if isinstance(item, Failure):
                    raise rejection_of(item, self._settings.retry_after_s)
                opening = b"" if started else self._form.first_chunk()
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                started = True
                if isinstance(item, Completion):
                    last = self._form.last_chunks(item, self._include_usage)
                    await send({"type": "http.response.body", "body": opening + last})
                    return
                data = opening + self._form.chunk(item.text, item.logprobs)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            raise Rejected(500, "the answer broke off before its end; ask again", code="internal")
        finally:
            # Leaving a loop over an async generator does not end it, and its place would stay taken.
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
