"""The ASGI middleware before the service: who may ask, one log line each, and no error without an answer."""

import logging
import time
import traceback
from collections.abc import Sequence
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reports.service.replies import Problem, problem_reply
from shortv.api_keys import CHALLENGES, is_accepted, is_local, key_in

logger = logging.getLogger("shortv.reports")
_GONE: Final = 499
_CHALLENGES: Final = tuple(("www-authenticate", challenge) for challenge in CHALLENGES)
_SAFE: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Lets requests in, and answers for whatever goes wrong behind it.

    `key_digests` are those of accepted keys; without any, only clients of this machine are answered. None means that
    somebody in front has checked them already.
    """

    def __init__(self, app: ASGIApp, key_digests: Sequence[str] | None) -> None:
        """Stand before an application."""
        self._app = app
        self._key_digests = key_digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted = _Noted(send)
        request = Request(scope)
        try:
            await self._work(request, receive, noted)
        except Exception as error:
            # Its message may hold what the caller sent or a file holds; where it happened cannot.
            logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            if noted.status:
                # Half an answer went out: the connection must break, or it would look whole.
                raise ConnectionAbortedError("the answer could not be finished") from None
            problem = Problem(500, "the service failed; its log tells more", "internal")
            await problem_reply(request, problem)(scope, receive, noted)
        finally:
            form = "%s status=%d kind=%s sent=%d ms=%.1f"
            method = scope["method"] if scope["method"] in ("GET", "HEAD") else "other"
            kind, milliseconds = scope.get("shortv.kind", "-"), 1000 * (time.perf_counter() - noted.began)
            logger.info(form, method, noted.status or _GONE, kind, noted.sent, milliseconds)

    async def _work(self, request: Request, receive: Receive, noted: "_Noted") -> None:
        try:
            self._admit(request)
            await self._app(request.scope, receive, noted)
        except Problem as problem:
            await problem_reply(request, problem)(request.scope, receive, noted)

    def _admit(self, request: Request) -> None:
        if self._key_digests is None:
            return
        headers = dict(request.scope["headers"])
        if self._key_digests:
            key = key_in(headers.get(b"authorization"))
            if not key:
                raise Problem(401, "an API key is needed, as Bearer or as Basic password", "no_key", _CHALLENGES)
            if not is_accepted(key, self._key_digests):
                raise Problem(401, "this API key is not one of the service's", "invalid_api_key", _CHALLENGES)
        elif not is_local(request.client.host if request.client else None, headers):
            message = "without an API key file only clients of this machine are answered, asked as localhost"
            raise Problem(403, f"{message}; start the service with --api-key-file", "loopback_only")


class _Noted:
    """Sends messages on, with the headers that every answer has, and counts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.sent = 0
        self.began = time.perf_counter()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_SAFE]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)
