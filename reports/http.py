"""The HTTP server of this project: one guard before every application, and the process that listens.

`Guard` is ASGI middleware for the endpoint and for the download service. It checks, in this order, the size of the
headers, the API key, the number of requests in flight, and reads the body within its limits, so that the application
gets a request whose body is complete. It answers `HttpError`, adds a request id and security headers, and writes one
log line per request. `serve_app` runs an application in uvicorn until a signal.
"""

import asyncio
import json
import logging
import re
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, NoReturn
from urllib.parse import quote

import uvicorn
from markupsafe import escape
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reports.access import CHALLENGES, is_accepted, is_local, key_in

logger = logging.getLogger("shortv.http")
MAX_HEADER_BYTES: Final = 32 * 2**10
RETRY_AFTER_S: Final = 1
RETRY_AFTER: Final = (b"retry-after", str(RETRY_AFTER_S).encode())
"""The header that tells a client when to try again."""
CLIENT_GONE: Final = 499
"""The status in the log of a request whose client went away."""
ERROR_POLICY: Final = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_INFO: Final = "shortv.request"
_LONGEST_PATH: Final = 200
_LONGEST_MESSAGE: Final = 1000
_ACCEPTED_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CLOSE: Final = (b"connection", b"close")
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process accepts at a time.

    `max_bytes_in_flight` bounds the bodies of all requests together, from their first byte to the end of their reply.
    `max_in_flight` counts requests with a complete body. `receive_timeout_s` is for the whole body.
    """

    max_body_bytes: int = 20 * 2**20
    max_bytes_in_flight: int = 256 * 2**20
    max_in_flight: int = 64
    receive_timeout_s: float = 120.0


class HttpError(Exception):
    """Ends a request with a status and an error body as OpenAI's clients expect it.

    `message` is one line for the caller, `code` a short word that programs can compare, `param` the wrong field.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        self.status = status
        self.message = message
        self.code = code
        self.headers = tuple(headers)
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


@dataclass(slots=True, kw_only=True)
class RequestInfo:
    """What is recorded about one HTTP request; nothing of its content.

    `request_id` is the caller's id if it is acceptable; `unique_id` is never shared by two requests. The application
    may set `subject`, the part of the log line that says what was requested, as `model=NAME`.
    """

    headers: dict[bytes, bytes]
    request_id: str
    unique_id: str
    line: str
    subject: str = "-"
    received: int = 0
    sent: int = 0
    status: int = 0
    content_type: bytes = b""
    started: float = field(default_factory=time.perf_counter)


def info_of(scope: Scope) -> RequestInfo:
    """Return what the guard recorded about a request."""
    info: RequestInfo = scope[_INFO]
    return info


def accepts_html(scope: Scope) -> bool:
    """Return whether a request prefers a page, as browsers do."""
    return b"text/html" in info_of(scope).headers.get(b"accept", b"")


def log_requests() -> None:
    """Write a line per request to this process's stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


@dataclass(slots=True)
class Guard:
    """Admits requests to an application within limits, and answers whatever is raised behind it.

    `key_digests` are the SHA-256 digests (hex) of accepted API keys; without any, only clients of this machine are
    answered. `open_paths` need no key. `sends_request_id` is False behind a proxy that adds the header itself.
    """

    app: ASGIApp
    key_digests: Sequence[str] = ()
    limits: Limits = Limits()
    open_paths: Sequence[str] = ()
    sends_request_id: bool = True
    _in_flight: int = field(default=0, init=False)
    _bytes_in_flight: int = field(default=0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; other scopes pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        info = scope[_INFO] = _begin(scope)
        counting = self._counting(info, send)
        try:
            error = await self._handle(scope, receive, counting)
            # Nothing is held any more: a client that does not read its error occupies only its socket.
            if error is not None:
                await _reply(error, scope, counting)
        finally:
            milliseconds = 1000 * (time.perf_counter() - info.started)
            form = "%s %s status=%d %s received=%d sent=%d ms=%.1f"
            counts = info.received, info.sent, milliseconds
            logger.info(form, info.request_id, info.line, info.status or CLIENT_GONE, info.subject, *counts)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> HttpError | None:
        info = info_of(scope)
        try:
            self._admit(scope)
            if scope["method"] in ("GET", "HEAD"):
                await self.app(scope, receive, send)
            else:
                await self._with_body(scope, receive, send)
        except HttpError as error:
            return error
        except Exception as error:
            # The message of the exception may contain what the caller sent; the frames cannot.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s %s\n%s", info.request_id, type(error).__name__, frames)
            return HttpError(500, f"the service failed; its log has more under {info.request_id}", code="internal")
        return None

    def _admit(self, scope: Scope) -> None:
        """Check the size of the headers, then the caller. Raises HttpError."""
        headers = info_of(scope).headers
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        if target + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            problem = f"the headers are longer than {MAX_HEADER_BYTES} bytes"
            raise HttpError(431, problem, code="headers_too_large", headers=[_CLOSE])
        if scope["path"].removeprefix(scope.get("root_path", "")) in self.open_paths:
            return
        if self.key_digests:
            key = key_in(headers.get(b"authorization"))
            if not is_accepted(key, self.key_digests):
                problem = "this API key is not accepted here" if key else "an API key is needed"
                message = f"{problem}; send one as 'Authorization: Bearer KEY', or as the password of Basic"
                challenges = [(b"www-authenticate", challenge.encode()) for challenge in CHALLENGES]
                raise HttpError(401, message, code="invalid_api_key", headers=challenges)
        elif not is_local((scope.get("client") or (None,))[0], headers):
            message = "without an API key file only clients of this machine are answered, at the name localhost"
            raise HttpError(403, f"{message}; start the service with --api-key-file", code="loopback_only")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a complete body: one that is sent slowly takes no slot from others."""
        info = info_of(scope)
        self._check_room()
        try:
            body = await self._body(info, receive)
            self._check_room()
            self._in_flight += 1
            try:
                await self.app(scope, _replay(body, receive), send)
            finally:
                self._in_flight -= 1
        finally:
            self._bytes_in_flight -= info.received

    def _check_room(self) -> None:
        if self._in_flight >= self.limits.max_in_flight:
            raise self._overloaded(f"{self._in_flight} requests are in flight, as many as are allowed")

    def _overloaded(self, problem: str, *headers: tuple[bytes, bytes]) -> HttpError:
        return HttpError(429, f"{problem}; try again later", code="overloaded", headers=(RETRY_AFTER, *headers))

    async def _body(self, info: RequestInfo, receive: Receive) -> bytes:
        """Receive the whole body within its limits, whatever its declared length. Raises HttpError."""
        limits = self.limits
        declared = info.headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limits.max_body_bytes):
            raise _too_large(limits.max_body_bytes)
        chunks = []
        try:
            async with asyncio.timeout(limits.receive_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(CLIENT_GONE, "the client went away", code="client_gone")
                    chunk = message.get("body", b"")
                    info.received += len(chunk)
                    self._bytes_in_flight += len(chunk)
                    if info.received > limits.max_body_bytes:
                        raise _too_large(limits.max_body_bytes)
                    if self._bytes_in_flight > limits.max_bytes_in_flight:
                        full = "the bodies of the requests in flight have as many bytes as are allowed"
                        raise self._overloaded(full, _CLOSE)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            problem = f"the body did not arrive within {limits.receive_timeout_s:g} s; send it faster"
            raise HttpError(408, problem, code="body_too_slow", headers=[_CLOSE]) from None

    def _counting(self, info: RequestInfo, send: Send) -> Send:
        own = [(b"x-request-id", info.request_id.encode())] if self.sends_request_id else []

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                info.status = message["status"]
                info.content_type = dict(message.get("headers", ())).get(b"content-type", b"")
                message["headers"] = [*message.get("headers", ()), *own, *_SECURITY_HEADERS]
            elif message["type"] == "http.response.body":
                info.sent += len(message.get("body", b""))
            await send(message)

        return counting


def guarded(routes: Sequence[BaseRoute], **options: Any) -> Starlette:
    """Return an application of these routes behind a guard with these options."""
    handlers = {HTTPException: _refuse_route}
    app = Starlette(routes=routes, middleware=[Middleware(Guard, **options)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _refuse_route(request: Request, error: Exception) -> NoReturn:
    """Handle an unknown path or method. Raises HttpError."""
    assert isinstance(error, HTTPException)
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    known = ", ".join(f"{method} {route.path_format}" for route in routes for method in sorted(route.methods or ()))
    headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    hint = f"; there is {known}" if known else ""
    raise HttpError(error.status_code, f"{error.detail.lower()}{hint}", code="no_route", headers=headers)


def _begin(scope: Scope) -> RequestInfo:
    headers = dict(scope["headers"])
    line = f"{scope['method'][:10]} {quote(scope['path'])[:_LONGEST_PATH]}"
    given, own = headers.get(b"x-request-id", b""), uuid.uuid4().hex
    if not _ACCEPTED_ID.fullmatch(given):
        return RequestInfo(headers=headers, request_id=own, unique_id=own, line=line)
    # Two callers may choose the same id, and replicas must not confuse their requests.
    shown = given.decode("ascii")
    return RequestInfo(headers=headers, request_id=shown, unique_id=f"{shown}.{own[:12]}", line=line)


def _too_large(limit: int) -> HttpError:
    # The rest of the body is not read, so the connection cannot carry another request.
    problem = f"the body is longer than the {limit} bytes that are allowed; send smaller or fewer images"
    return HttpError(413, problem, code="body_too_large", headers=[_CLOSE])


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once and then waits for the client to disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _reply(error: HttpError, scope: Scope, send: Send) -> None:
    """Send an error: as JSON, as a page for browsers, or as the last event of a stream that has begun."""
    info = info_of(scope)
    if info.status:
        if not info.content_type.startswith(b"text/event-stream"):
            # Part of a file was sent: the connection must break, or the file would look complete.
            raise ConnectionAbortedError("the reply could not be completed")
        await send({"type": "http.response.body", "body": b"data: " + error.body + b"\n\n"})
        info.status = error.status
        return
    body, headers = error.body + b"\n", [(b"content-type", b"application/json")]
    if accepts_html(scope):
        title = escape(f"{error.status} {(error.code or 'error').replace('_', ' ')}")
        page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><h1>{title}</h1>"
        body = f"{page}<p>{escape(error.message)}</p>\n".encode(errors="replace")
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", ERROR_POLICY)]
    headers += [*error.headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def serve_app(
    app: ASGIApp, listening: socket.socket, *, announce: Callable[[], None], max_connections: int | None = None
) -> None:
    """Serve an application on a bound socket until SIGTERM or Ctrl-C; requests in flight then have 10 s to end.

    `announce` is called as soon as requests are accepted.
    """
    config = uvicorn.Config(
        app,
        # uvicorn's default parser does not limit headers.
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=10,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    asyncio.run(_Server(config, announce).serve([listening]))


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a request that the end of the server cut off: uvicorn logs their number."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """A server that ends at a signal and does not raise it again afterwards."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at the second signal without waiting for requests in flight."""
        self.force_exit = self.should_exit
        self.should_exit = True
