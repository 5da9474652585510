"""Replies to chat requests in the form of OpenAI's API, whole and in chunks, and what failures become."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reports.http import CLIENT_GONE, RETRY_AFTER, HttpError
from shortv.request import Chunk, Completion, Failure, Reason, Request, TokenLogprob
from shortv.workers.serving.chat_request import ChatCall

# JSON has no infinity; OpenAI writes this for a token of probability 0.
_LEAST_LOGPROB = -9999.0
_STATUSES = {
    Reason.INVALID: 400,
    Reason.UNKNOWN_PLAN: 404,
    Reason.OVERLOADED: 503,
    Reason.DEADLINE: 504,
    Reason.LOST: 503,
    Reason.INTERNAL: 500,
}
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_TIMES = ("queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms")
T = TypeVar("T")


class ChatReply(Response):
    """Has a request completed while its client is there, and sends the completion, whole or as server-sent events.

    The status of a stream waits for the first chunk, so that a failure before it has its own status.
    """

    def __init__(self, call: ChatCall, request: Request, replicas: Any) -> None:
        """Take the call, its request with the plan, and the `ReplicaClient`."""
        super().__init__()
        self._call, self._request, self._replicas = call, request, replicas
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything. Raises HttpError for a failure, before or after the first chunk."""
        if self._call.stream:
            await self._within(self._send_chunks(send), receive)
            return
        found = await self._within(self._replicas.complete(self._request), receive)
        await Response(self._whole(_checked(found)), media_type="application/json")(scope, receive, send)

    async def _within(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        try:
            async with asyncio.timeout(self._request.timeout_s):
                return await unless_gone(work, receive)
        except TimeoutError:
            problem = f"the completion was not whole within {self._request.timeout_s:g} s; request fewer tokens"
            raise HttpError(504, problem, code="deadline") from None

    async def _send_chunks(self, send: Send) -> None:
        chunks: AsyncGenerator[Chunk | Completion | Failure] = self._replicas.stream(self._request)
        opening = self._chunk({"role": "assistant", "content": "", "refusal": None})
        try:
            async for item in chunks:
                found: Any = _checked(item)
                ended = isinstance(found, Completion)
                event = self._last(found) if ended else self._chunk({"content": found.text}, found.logprobs)
                if opening:
                    await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
                await send({"type": "http.response.body", "body": opening + event, "more_body": not ended})
                if ended:
                    return
                opening = b""
            raise HttpError(500, "the stream ended before the completion was whole; try again", code="internal")
        finally:
            # Leaving a loop over an async generator does not close it, and its place would stay occupied.
            await chunks.aclose()

    def _whole(self, completion: Completion) -> bytes:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = self._choice("message", message, completion.logprobs, completion.finish_reason)
        extra = {"usage": _usage(completion), "shortv": self._vendor(completion)}
        return _json(self._body("chat.completion", choice, **extra))

    def _chunk(
        self, delta: Any, logprobs: Sequence[TokenLogprob] | None = None, finish: str | None = None, **extra: Any
    ) -> bytes:
        return _event(self._body("chat.completion.chunk", self._choice("delta", delta, logprobs, finish), **extra))

    def _last(self, completion: Completion) -> bytes:
        """Return the events with the reason of the end and the usage, and the end of the stream."""
        last = self._chunk({}, finish=completion.finish_reason, shortv=self._vendor(completion))
        if self._call.include_usage:
            last += _event(self._body("chat.completion.chunk", usage=_usage(completion)))
        return last + b"data: [DONE]\n\n"

    def _body(self, kind: str, *choices: Any, **extra: Any) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self._request.request_id}", "object": kind, "created": self._created}
        return {**head, "model": self._call.model, "choices": choices, **extra}

    def _choice(self, name: str, content: Any, found: Sequence[TokenLogprob] | None, finish: str | None) -> Any:
        wanted = found is not None and self._request.sampling.top_logprobs is not None
        logprobs = {"content": [_entry(*one) for one in found or ()], "refusal": None} if wanted else None
        return {"index": 0, name: content, "logprobs": logprobs, "finish_reason": finish}

    def _vendor(self, completion: Completion) -> dict[str, Any]:
        return {
            "plan": self._request.plan or "full",
            "plan_digest": completion.plan_digest,
            "exit_layer": completion.exit_layer,
            **{name: round(getattr(completion, name), 3) for name in _TIMES},
        }


def _checked(found: T | Failure) -> T:
    """Return what is not a failure. Raises HttpError."""
    if not isinstance(found, Failure):
        return found
    code = "model_not_found" if found.reason is Reason.UNKNOWN_PLAN else str(found.reason).replace("-", "_")
    headers = [RETRY_AFTER] if found.passing else []
    raise HttpError(_STATUSES[found.reason], found.message, code=code, headers=headers)


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Await some work, and cancel it when the client disconnects or the caller is cancelled.

    The work has ended, clean-up included, when this returns or raises. The body must have been received before.

    Raises:
        HttpError: the client disconnected.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            watcher.result()
            raise HttpError(CLIENT_GONE, "the client went away", code="client_gone")
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(body) + b"\n\n"


def _usage(completion: Completion) -> dict[str, int]:
    prompt, generated = completion.prompt_tokens, completion.completion_tokens
    counts = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    return counts | {"visual_tokens": completion.visual_tokens}


def _entry(token: str, logprob: float, top: Sequence[tuple[str, float]] | None = None) -> dict[str, Any]:
    value = _LEAST_LOGPROB if logprob == -math.inf else logprob
    entry = {"token": token, "logprob": value, "bytes": list(token.encode("utf-8", "surrogatepass"))}
    return entry if top is None else entry | {"top_logprobs": [_entry(*other) for other in top]}
