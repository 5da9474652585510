"""The HTTP application in front of the replicas: OpenAI's chat API behind the guard of `reports.http`, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from reports.http import CLIENT_GONE, Guard, HttpError, Limits, info_of, refuse_route, retry_after
from shortv.request import FULL_MODEL, Chunk, Completion, Failure, Reason, Request
from shortv.workers.serving.chat_reply import ReplyForm, model_card, to_json
from shortv.workers.serving.chat_request import ChatCall, read_chat
from shortv.workers.serving.spec import EndpointSpec

HEALTH_PATH = "/healthz"
REPORTS_PATH = "/reports"
# Smaller bodies are parsed on the event loop: handing them to a thread costs more.
_SMALL_BODY = 64 * 2**10
# How long looking up the plans or the health of the replicas may take.
_LOOKUP_S = 10.0
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
T = TypeVar("T")


class Replicas(Protocol):
    """Completes requests. Cancelling an awaited call frees its place in the batch."""

    async def complete(self, request: Request) -> Completion | Failure:
        """Complete a request."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        """Complete a request in chunks; the whole completion or a failure comes last."""
        ...

    async def plans(self) -> Mapping[str, str]:
        """Digest of each plan by name; called for every request, so it must be cheap. Raises TimeoutError."""
        ...

    async def healthy(self) -> bool:
        """Whether requests can be completed."""
        ...


def make_endpoint(
    spec: EndpointSpec,
    replicas: Replicas,
    *,
    key_digests: Sequence[str] = (),
    reports: ASGIApp | None = None,
    sends_request_id: bool = True,
) -> Starlette:
    """Build the application: /v1/models, /v1/chat/completions and /healthz, errors in OpenAI's form.

    The served name is the full model, `NAME@PLAN` the model under that plan.

    Args:
        key_digests: SHA-256 digests (hex) of accepted API keys; without any, only this machine is answered.
        reports: what answers below /reports/, behind the same guard.
        sends_request_id: False behind a proxy that adds `x-request-id` itself.
    """
    limits = limits_of(spec)
    api = _ChatApi(spec, replicas, limits)
    routes: list[Route | Mount] = [
        Route("/v1/chat/completions", api.complete, methods=["POST"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route(HEALTH_PATH, api.health, methods=["GET"]),
    ]
    if reports is not None:
        # Links in the list of runs are relative to its folder.
        routes += [Route(REPORTS_PATH, _to_reports, methods=["GET"]), Mount(REPORTS_PATH, reports)]
    guard = Middleware(
        Guard, key_digests=key_digests, limits=limits, open_paths=(HEALTH_PATH,), sends_request_id=sends_request_id
    )
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: refuse_route})
    app.router.redirect_slashes = False
    return app


def limits_of(spec: EndpointSpec) -> Limits:
    """Return the limits of the guard: together, bodies may have 1 MiB per request in flight, and at least 256 MiB."""
    body = int(spec.max_body_mb * 2**20)
    return Limits(
        max_body_bytes=body,
        max_bytes_in_flight=max(256 * 2**20, 4 * body, spec.max_in_flight * 2**20),
        max_in_flight=spec.max_in_flight,
        receive_timeout_s=spec.timeout,
    )


class _ChatApi:
    """The handlers of the routes."""

    def __init__(self, spec: EndpointSpec, replicas: Replicas, limits: Limits) -> None:
        self._spec = spec
        self._replicas = replicas
        self._retry_after_s = limits.retry_after_s
        self._created = int(time.time())

    async def complete(self, http: HttpRequest) -> Response:
        """Complete a chat, whole or as a stream."""
        info = info_of(http.scope)
        call = await self._read(http)
        names = self._names(await self._plans())
        request = replace(call.request, plan=_plan_of(call.model, names))
        info.subject = f"model={call.model}"
        form = ReplyForm(
            completion_id=f"chatcmpl-{request.request_id}",
            created=int(time.time()),
            model=call.model,
            plan=request.plan or "full",
            with_logprobs=request.sampling.top_logprobs is not None,
        )
        if call.stream:
            stream = partial(self._replicas.stream, request)
            return EventStream(
                stream, form, timeout_s=self._spec.timeout, fail=self._error, include_usage=call.include_usage
            )
        try:
            async with asyncio.timeout(self._spec.timeout):
                found = await unless_gone(self._replicas.complete(request), http.receive)
        except TimeoutError:
            raise _too_late(self._spec.timeout) from None
        if isinstance(found, Failure):
            raise self._error(found)
        return _json(form.whole(found))

    async def models(self, _: HttpRequest) -> Response:
        """List the full model and its plans."""
        return _json(to_json({"object": "list", "data": list((await self._cards()).values())}))

    async def model(self, http: HttpRequest) -> Response:
        """Describe one model."""
        name, cards = http.path_params["name"], await self._cards()
        _plan_of(name, dict.fromkeys(cards, ""))
        return _json(to_json(cards[name]))

    async def health(self, _: HttpRequest) -> Response:
        """Say whether replicas can complete requests."""
        try:
            async with asyncio.timeout(_LOOKUP_S):
                healthy = await self._replicas.healthy()
        except TimeoutError:
            healthy = False
        if not healthy:
            raise self._unavailable()
        return _json(b'{"status":"ok"}')

    async def _read(self, http: HttpRequest) -> ChatCall:
        info = info_of(http.scope)
        kind = info.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise HttpError(415, "the body is not declared as JSON; send 'Content-Type: application/json'")
        body = await http.body()
        read = partial(read_chat, body, self._spec, request_id=info.unique_id)
        return read() if len(body) <= _SMALL_BODY else await asyncio.to_thread(read)

    async def _plans(self) -> Mapping[str, str]:
        try:
            async with asyncio.timeout(_LOOKUP_S):
                return await self._replicas.plans()
        except TimeoutError:
            raise self._unavailable() from None

    def _names(self, plans: Mapping[str, str]) -> dict[str, str]:
        """Return the plan of each model name that clients may use."""
        served = self._spec.served_name
        return {served: FULL_MODEL, **{f"{served}@{plan}": plan for plan in sorted(plans) if plan != FULL_MODEL}}

    async def _cards(self) -> dict[str, dict[str, Any]]:
        plans = await self._plans()
        return {
            name: model_card(name, plan or "full", plans.get(plan), self._created)
            for name, plan in self._names(plans).items()
        }

    def _error(self, failure: Failure) -> HttpError:
        headers = [retry_after(self._retry_after_s)] if failure.passing else []
        code = str(failure.reason).replace("-", "_")
        code = "model_not_found" if failure.reason is Reason.UNKNOWN_PLAN else code
        return HttpError(_STATUSES[failure.reason], failure.message, code=code, headers=headers)

    def _unavailable(self) -> HttpError:
        headers = [retry_after(self._retry_after_s)]
        return HttpError(503, "no replica is available; try again later", code="unavailable", headers=headers)


class EventStream(Response):
    """Sends the chunks of a completion as server-sent events.

    The status waits for the first chunk, so that a failure before it has its own status.
    """

    def __init__(
        self,
        chunks: Callable[[], AsyncIterator[Chunk | Completion | Failure]],
        form: ReplyForm,
        *,
        timeout_s: float,
        fail: Callable[[Failure], HttpError],
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._form = form
        self._timeout_s = timeout_s
        self._fail = fail
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything. Raises HttpError for a failure, before or after the first chunk."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await unless_gone(self._send_all(send), receive)
        except TimeoutError:
            raise _too_late(self._timeout_s) from None

    async def _send_all(self, send: Send) -> None:
        chunks = self._chunks()
        try:
            started = False
            async for item in chunks:
                if isinstance(item, Failure):
                    raise self._fail(item)
                opening = b"" if started else self._form.first_chunk()
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
                started = True
                if isinstance(item, Completion):
                    last = self._form.last_chunks(item, include_usage=self._include_usage)
                    await send({"type": "http.response.body", "body": opening + last})
                    return
                data = opening + self._form.chunk(item.text, item.logprobs)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            raise HttpError(500, "the stream ended before the completion was whole; try again", code="internal")
        finally:
            # Leaving a loop over an async generator does not close it, and its place would stay occupied.
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Await some work, and cancel it when the client disconnects or the caller is cancelled.

    The work has ended, clean-up included, when this returns or raises. The body must have been received before.

    Raises:
        HttpError: the client disconnected.
    """
    worker, watcher = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _to_reports(_: HttpRequest) -> Response:
    return Response(status_code=308, headers={"location": f".{REPORTS_PATH}/"})


def _plan_of(model: str, names: Mapping[str, str]) -> str:
    """Return the plan that a model name stands for. Raises HttpError with the known names."""
    if model not in names:
        problem = f"this model is not served here; known: {', '.join(names)}"
        raise HttpError(404, problem, param="model", code="model_not_found")
    return names[model]


def _too_late(seconds: float) -> HttpError:
    problem = f"the completion was not whole within {seconds:g} s; request fewer tokens"
    return HttpError(504, problem, code="deadline")


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
