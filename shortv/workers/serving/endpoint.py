"""The HTTP face of the replicas: an OpenAI-style endpoint as a FastAPI application, without any Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from shortv.request import Chunk, Completion, Failure, Request
from shortv.workers.serving.event_stream import EventStream
from shortv.workers.serving.gate import HEALTH_PATH, Gate, visit_of
from shortv.workers.serving.openai_answers import AnswerForm, model_card, to_json
from shortv.workers.serving.questions import Asked, model_names, plan_of, read_question
from shortv.workers.serving.rejection import Rejected, rejection_of, retry_after, too_late
from shortv.workers.serving.settings import EndpointSettings
from shortv.workers.serving.waiting import read_body, unless_gone

__all__ = ["EndpointSettings", "Replicas", "make_endpoint"]
REPORTS_PATH = "/reports"
# Smaller bodies are read where they are: handing them to a thread costs more.
_SMALL_BODY = 64 * 2**10
# How long a look at the replicas may take that asks them nothing.
_LOOK_S = 10.0


class Replicas(Protocol):
    """Whoever answers questions. Cancelling what is awaited gives the question's place to another one."""

    async def complete(self, request: Request) -> Completion | Failure:
        """Answer one question."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Chunk | Completion | Failure]:
        """Answer in pieces; the whole answer or a failure is the last one."""
        ...

    async def plans(self) -> Mapping[str, str]:
        """Digest of each plan by name; asked for every request, so it must be cheap. Raises TimeoutError."""
        ...

    async def healthy(self) -> bool:
        """Whether questions can be answered."""
        ...


def make_endpoint(
    model_name: str, replicas: Replicas, settings: EndpointSettings, *, reports: ASGIApp | None = None
) -> FastAPI:
    """Build the application: /v1/models, /v1/chat/completions and /healthz, errors in OpenAI's form.

    `reports` is what answers below /reports/, behind the same keys.
    Names: `model_name` is the full model, `model_name@PLAN` the model under that plan.
    """
    face = _Face(model_name, replicas, settings)
    app = FastAPI(title="shortv", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_api_route("/v1/chat/completions", face.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", face.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", face.model, methods=["GET"], response_model=None)
    app.add_api_route(HEALTH_PATH, face.health, methods=["GET"], response_model=None)
    if reports is not None:
        # Links on the list of runs are relative to its folder.
        app.add_api_route(REPORTS_PATH, _to_reports, methods=["GET"], response_model=None)
        app.mount(REPORTS_PATH, reports)
    app.add_exception_handler(HTTPException, _route_problem)
    app.add_middleware(Gate, settings=settings)
    return app


class _Face:
    """What the routes do."""

    def __init__(self, model_name: str, replicas: Replicas, settings: EndpointSettings) -> None:
        self._model_name = model_name
        self._replicas = replicas
        self._settings = settings
        self._created = int(time.time())

    async def complete(self, request: HttpRequest) -> Response:
        """Answer a conversation, whole or as a stream."""
        settings, visit = self._settings, visit_of(request.scope)
        asked = await self._read(request)
        plan = plan_of(asked.model, model_names(self._model_name, await self._plans()))
        visit.model = asked.model
        question = asked.question(visit.unique_id, plan, settings.timeout_s)
        form = _form(question, asked)
        if asked.stream:
            ask = partial(self._replicas.stream, question)
            return EventStream(ask, form, settings, include_usage=asked.include_usage)
        try:
            async with asyncio.timeout(settings.timeout_s):
                found = await unless_gone(self._replicas.complete(question), request.receive)
        except TimeoutError:
            raise too_late(settings.timeout_s) from None
        if isinstance(found, Failure):
            raise rejection_of(found, settings.retry_after_s)
        return _json(form.whole(found))

    async def models(self) -> Response:
        """List the full model and its plans."""
        return _json(to_json({"object": "list", "data": list((await self._cards()).values())}))

    async def model(self, name: str) -> Response:
        """Describe one model."""
        cards = await self._cards()
        plan_of(name, {known: "" for known in cards})
        return _json(to_json(cards[name]))

    async def health(self) -> Response:
        """Say whether replicas can answer."""
        try:
            async with asyncio.timeout(_LOOK_S):
                healthy = await self._replicas.healthy()
        except TimeoutError:
            healthy = False
        if not healthy:
            raise self._away()
        return _json(b'{"status":"ok"}')

    async def _read(self, request: HttpRequest) -> Asked:
        """Read the body within its bounds, big ones off the event loop; raises Rejected."""
        settings, visit = self._settings, visit_of(request.scope)
        kind = visit.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Rejected(415, "the body is not marked as JSON; send 'Content-Type: application/json'")
        try:
            async with asyncio.timeout(settings.timeout_s):
                body = await read_body(request.receive, visit.headers, settings.max_body_bytes)
        except TimeoutError:
            problem = f"the body did not arrive within {settings.timeout_s:g} s; send it faster"
            raise Rejected(408, problem, code="body_too_slow", headers=[(b"connection", b"close")]) from None
        visit.received = len(body)
        if len(body) <= _SMALL_BODY:
            return read_question(body, settings)
        return await asyncio.to_thread(read_question, body, settings)

    async def _plans(self) -> Mapping[str, str]:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await self._replicas.plans()
        except TimeoutError:
            raise self._away() from None

    def _away(self) -> Rejected:
        headers = [retry_after(self._settings.retry_after_s)]
        return Rejected(503, "no replica can answer now; ask again later", code="unavailable", headers=headers)

    async def _cards(self) -> dict[str, dict[str, Any]]:
        plans = await self._plans()
        names = model_names(self._model_name, plans)
        return {name: model_card(name, plan or "full", plans.get(plan), self._created) for name, plan in names.items()}


async def _to_reports() -> Response:
    return Response(status_code=308, headers={"location": f".{REPORTS_PATH}/"})


def _form(request: Request, asked: Asked) -> AnswerForm:
    return AnswerForm(
        completion_id=f"chatcmpl-{request.request_id}",
        created=int(time.time()),
        model=asked.model,
        plan=request.plan or "full",
        with_logprobs=request.sampling.top_logprobs is not None,
    )


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def _route_problem(request: HttpRequest, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    known = ", ".join(f"{method} {route.path_format}" for route in routes for method in sorted(route.methods or ()))
    allowed = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    raise Rejected(error.status_code, f"{error.detail.lower()}; there is {known}", code="no_route", headers=allowed)
