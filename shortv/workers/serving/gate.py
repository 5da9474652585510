"""The ASGI middleware before all routes: who may ask, how many at once, errors in one form, one log line each."""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shortv.workers.serving.openai_answers import event
from shortv.workers.serving.rejection import CLIENT_GONE, Rejected, retry_after
from shortv.workers.serving.security import check_key, check_local
from shortv.workers.serving.settings import EndpointSettings

logger = logging.getLogger("shortv.endpoint")
HEALTH_PATH = "/healthz"
_VISIT = "shortv.visit"
_LONGEST_PATH = 200
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def log_requests() -> None:
    """Let this process write a line per request to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


@dataclass(slots=True, kw_only=True)
class Visit:
    """What is noted about one HTTP request; nothing of its content."""

    headers: dict[bytes, bytes]
    shown_id: str
    """The caller's own id where it is acceptable."""
    unique_id: str
    line: str
    """Method and path; quoted, so that it is one line whatever the path holds."""
    model: str | None = None
    """The model's name, once it is known to be one of ours."""
    received: int = 0
    sent: int = 0
    status: int = 0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, scope: Scope) -> Visit:
        """Begin the notes of a request."""
        headers = dict(scope["headers"])
        line = f"{scope['method']} {quote(scope['path'])[:_LONGEST_PATH]}"
        given, own = headers.get(b"x-request-id", b""), uuid.uuid4().hex
        if not _ACCEPTED_ID.fullmatch(given):
            return cls(headers=headers, shown_id=own, unique_id=own, line=line)
        # Two callers may choose one id, and replicas must not mistake their questions for each other.
        shown = given.decode("ascii")
        return cls(headers=headers, shown_id=shown, unique_id=f"{shown}.{own[:12]}", line=line)


def visit_of(scope: Scope) -> Visit:
    """The notes of a request that came through the gate."""
    visit: Visit = scope[_VISIT]
    return visit


class Gate:
    """Lets requests in, and answers for whatever goes wrong behind it."""

    def __init__(self, app: ASGIApp, settings: EndpointSettings) -> None:
        """Stand before an application."""
        self._app = app
        self._settings = settings
        self._in_flight = 0
        problem = f"{settings.max_in_flight} requests are being worked on, the most that are allowed; ask again later"
        headers = [retry_after(settings.retry_after_s)]
        # Made once: under overload a refusal costs next to nothing.
        self._full = Rejected(429, problem, code="overloaded", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope[_VISIT] = Visit.begin(scope)
        noting = self._noting(visit, send)
        try:
            problem = await self._work(scope, receive, noting)
            # Here the place is free again: a client that does not read its error holds nothing but a socket.
            if problem is not None:
                await _tell(problem, visit, noting)
        finally:
            _log(visit)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> Rejected | None:
        try:
            self._admit(scope)
            with self._place(scope):
                await self._app(scope, receive, send)
        except Rejected as rejected:
            return rejected
        except Exception as error:
            # Its message may hold what the caller sent; where it happened cannot.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s %s\n%s", visit_of(scope).shown_id, type(error).__name__, frames)
            problem = f"the service failed; its log tells more under {visit_of(scope).shown_id}"
            return Rejected(500, problem, code="internal")
        return None

    def _admit(self, scope: Scope) -> None:
        """Check who asks; raises Rejected."""
        if scope["path"].removeprefix(scope.get("root_path", "")) == HEALTH_PATH:
            return
        headers = visit_of(scope).headers
        if self._settings.key_digests:
            check_key(headers.get(b"authorization"), self._settings.key_digests)
        else:
            client = scope.get("client")
            check_local(client[0] if client else None, headers)

    @contextmanager
    def _place(self, scope: Scope) -> Iterator[None]:
        if scope["method"] != "POST":
            yield
            return
        if self._in_flight >= self._settings.max_in_flight:
            raise self._full.with_traceback(None)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _noting(self, visit: Visit, send: Send) -> Send:
        own = [(b"x-request-id", visit.shown_id.encode())] if self._settings.sends_request_id else []

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own]
            elif message["type"] == "http.response.body":
                visit.sent += len(message.get("body", b""))
            await send(message)

        return noting


async def _tell(problem: Rejected, visit: Visit, send: Send) -> None:
    """Answer with an error; in a stream that has begun it is the last event."""
    if visit.status:
        await send({"type": "http.response.body", "body": event(problem.body)})
        visit.status = problem.status
        return
    length = (b"content-length", str(len(problem.body)).encode())
    await send({"type": "http.response.start", "status": problem.status, "headers": [*problem.headers, length]})
    await send({"type": "http.response.body", "body": problem.body})


def _log(visit: Visit) -> None:
    milliseconds = 1000 * (time.perf_counter() - visit.started)
    status, model = visit.status or CLIENT_GONE, visit.model or "-"
    form = "%s %s status=%d model=%s received=%d sent=%d ms=%.1f"
    logger.info(form, visit.shown_id, visit.line, status, model, visit.received, visit.sent, milliseconds)
