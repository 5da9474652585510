"""The HTTP application in front of the replicas: OpenAI's chat API behind the guard of `reports.http`, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from reports.http import RETRY_AFTER, HttpError, Limits, guarded, info_of
from shortv.request import FULL_MODEL
from shortv.workers.serving.chat_reply import ChatReply
from shortv.workers.serving.chat_request import read_chat
from shortv.workers.serving.spec import EndpointSpec

if TYPE_CHECKING:
    from shortv.workers.serving.client import ReplicaClient

HEALTH_PATH = "/healthz"
REPORTS_PATH = "/reports"
# Smaller bodies are parsed on the event loop: handing them to a thread costs more.
_SMALL_BODY = 64 * 2**10


def make_endpoint(
    spec: EndpointSpec,
    replicas: ReplicaClient,
    *,
    key_digests: Sequence[str] = (),
    reports: ASGIApp | None = None,
    sends_request_id: bool = True,
) -> Starlette:
    """Build the application: /v1/models, /v1/chat/completions and /healthz, errors in OpenAI's form.

    The served name is the full model, `NAME@PLAN` the model under that plan. Bodies may have 1 MiB per request in
    flight together, and at least 256 MiB.

    Args:
        key_digests: SHA-256 digests (hex) of accepted API keys; without any, only this machine is answered.
        reports: what answers below /reports/, behind the same guard.
        sends_request_id: False behind a proxy that adds `x-request-id` itself.
    """
    api = _ChatApi(spec, replicas)
    routes: list[Route | Mount] = [
        Route("/v1/chat/completions", api.complete, methods=["POST"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route(HEALTH_PATH, api.health, methods=["GET"]),
    ]
    if reports is not None:
        # Links in the list of runs are relative to its folder.
        routes += [Route(REPORTS_PATH, _to_reports, methods=["GET"]), Mount(REPORTS_PATH, reports)]
    body = int(spec.max_body_mb * 2**20)
    limits = Limits(
        max_body_bytes=body,
        max_bytes_in_flight=max(256 * 2**20, 4 * body, spec.max_in_flight * 2**20),
        max_in_flight=spec.max_in_flight,
        receive_timeout_s=spec.timeout,
    )
    return guarded(
        routes,
        key_digests=key_digests,
        limits=limits,
        open_paths=(HEALTH_PATH,),
        sends_request_id=sends_request_id,
    )


class _ChatApi:
    """The handlers of the routes."""

    def __init__(self, spec: EndpointSpec, replicas: ReplicaClient) -> None:
        self._spec = spec
        self._replicas = replicas
        self._created = int(time.time())

    async def complete(self, http: HttpRequest) -> Response:
        """Complete a chat, whole or as a stream."""
        info = info_of(http.scope)
        kind = info.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise HttpError(415, "the body is not declared as JSON; send 'Content-Type: application/json'")
        body = await http.body()
        read = partial(read_chat, body, self._spec, request_id=info.unique_id)
        call = read() if len(body) <= _SMALL_BODY else await asyncio.to_thread(read)
        _card_of(call.model, await self._cards())
        info.subject = f"model={call.model}"
        plan = call.model[len(self._spec.served_name) + 1 :]
        return ChatReply(call, replace(call.request, plan=plan), self._replicas)

    async def models(self, _: HttpRequest) -> Response:
        """List the full model and its plans."""
        return JSONResponse({"object": "list", "data": list((await self._cards()).values())})

    async def model(self, http: HttpRequest) -> Response:
        """Describe one model."""
        return JSONResponse(_card_of(http.path_params["name"], await self._cards()))

    async def health(self, _: HttpRequest) -> Response:
        """Say whether replicas can complete requests."""
        await self._plans(fresh=True)
        return JSONResponse({"status": "ok"})

    async def _plans(self, *, fresh: bool = False) -> Mapping[str, str]:
        try:
            return await self._replicas.plans(fresh=fresh)
        except TimeoutError:
            headers = [RETRY_AFTER]
            problem = "no replica is available; try again later"
            raise HttpError(503, problem, code="unavailable", headers=headers) from None

    async def _cards(self) -> dict[str, dict[str, Any]]:
        """Return OpenAI's description of each model by its name."""
        plans, served = await self._plans(), self._spec.served_name
        names = {served: FULL_MODEL, **{f"{served}@{plan}": plan for plan in sorted(plans) if plan != FULL_MODEL}}
        card = {"object": "model", "created": self._created, "owned_by": "shortv"}
        return {
            name: {"id": name, **card, "shortv": {"plan": plan or "full", "plan_digest": plans.get(plan)}}
            for name, plan in names.items()
        }


async def _to_reports(_: HttpRequest) -> Response:
    return RedirectResponse(f".{REPORTS_PATH}/", status_code=308)


def _card_of(name: str, cards: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in cards:
        problem = f"this model is not served here; known: {', '.join(cards)}"
        raise HttpError(404, problem, param="model", code="model_not_found")
    return cards[name]
