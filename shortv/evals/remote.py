"""Questions to replicas by URL, over an OpenAI-style endpoint."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

import httpx

from shortv.errors import Refused, ShortVError
from shortv.evals.asking import Client
from shortv.evals.openai_form import VENDOR, answer_of, body_of, failure_of
from shortv.evals.served_settings import ServedSettings
from shortv.request import Completion, Failure, Likelihood, Reason, Request

_TRIES: Final = 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_CONNECT_S: Final = 10.0
# The endpoint's own deadline should speak first.
_SLACK_S: Final = 5.0
_LATER: Final = (429, 503)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class Connection(NamedTuple):
    """A client, and the plan that its questions name, as the replicas know it; None is no plan or an unknown one."""

    client: Client
    plan: str
    plan_digest: str | None


class RemoteClient:
    """Asks an endpoint. What may pass (429, 503, lost connections) is tried again, so often and so long."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        """Take a client whose base URL is the endpoint's, and the full model's name there."""
        self._http = http
        self._model = model

    async def complete(self, request: Request) -> Completion | Failure:
        """Answer one question within its seconds, waiting where the endpoint asks for it."""
        until = time.monotonic() + request.timeout_s
        model = f"{self._model}@{request.plan}" if request.plan else self._model
        content = json.dumps(body_of(request, model)).encode()
        pause = _FIRST_PAUSE_S
        for tried in range(1, _TRIES + 1):
            found, asked_pause = await self._try(content, until)
            # Questions that were turned away together must not come back together.
            wait = max(asked_pause, pause) * random.uniform(1.0, 1.25)
            passing = isinstance(found, Failure) and found.passing
            if not passing or tried == _TRIES or time.monotonic() + wait > until:
                return found
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise AssertionError("the last try returns")

    async def score(self, request: Request) -> Likelihood | Failure:
        """Refused: OpenAI's form has no place for it."""
        raise Refused(
            "a URL cannot carry likelihood, which this task asks for; use app=NAME, or the model shortv in one process"
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _try(self, content: bytes, until: float) -> tuple[Completion | Failure, float]:
        left = max(until - time.monotonic(), 0.0) + _SLACK_S
        timeout = httpx.Timeout(left, connect=min(left, _CONNECT_S))
        headers = {"Content-Type": "application/json"}
        try:
            response = await self._http.post("chat/completions", content=content, headers=headers, timeout=timeout)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
            return Failure(reason=Reason.DEADLINE, message="the endpoint gave no answer in time"), 0.0
        except httpx.TransportError as error:
            return Failure(reason=Reason.LOST, message=f"no connection to the endpoint: {_why(error)}"), 0.0
        found = answer_of(_json(response)) if response.is_success else failure_of(response.status_code, _json(response))
        return found, _retry_after(response) if response.status_code in _LATER else 0.0


async def connect_url(settings: ServedSettings, transport: httpx.AsyncBaseTransport | None = None) -> Connection:
    """Connect to `settings.url` and find the model and its plan among those it lists.

    Raises:
        Refused: the endpoint has no such model or plan, or does not accept the key.
        ShortVError: it cannot be reached, or what it says is no list of models.
    """
    key = settings.api_key()
    async with AsyncExitStack() as stack:
        http = httpx.AsyncClient(
            base_url=f"{settings.url}/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=settings.num_concurrent),
            timeout=_CONNECT_S,
            transport=transport,
            # A proxy of the environment leads away from this machine.
            trust_env=httpx.URL(settings.url or "").host not in _LOOPBACK,
        )
        stack.push_async_callback(http.aclose)
        models = await _models(http, settings)
        name = settings.served_name
        if name not in models:
            given = f"has no model {name!r}" if name else "is asked for no model"
            raise Refused(f"{settings.url} {given}; set model= to one of {', '.join(sorted(models)) or 'none'}")
        digest = (models[name].get(VENDOR) or {}).get("plan_digest")
        if settings.plan and digest is None:
            raise Refused(f"{settings.url} does not say which plan {name!r} is; ask an endpoint of jobs/serve.py")
        stack.pop_all()
    return Connection(RemoteClient(http, settings.model or ""), settings.plan, digest)


async def _models(http: httpx.AsyncClient, settings: ServedSettings) -> dict[str, Mapping[str, Any]]:
    try:
        response = await http.get("models")
    except httpx.HTTPError as error:
        raise ShortVError(f"{settings.url} cannot be reached: {_why(error)}; is the endpoint running?") from error
    if response.status_code in (401, 403):
        raise Refused(f"{settings.url} does not accept the key; give its file with api_key_file=FILE")
    try:
        return {str(entry["id"]): entry for entry in _json(response)["data"]}
    except (KeyError, TypeError) as error:
        raise ShortVError(
            f"{settings.url}/models answers {response.status_code} and lists no models; is it an OpenAI-style endpoint?"
        ) from error


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _retry_after(response: httpx.Response) -> float:
    """Seconds the endpoint asks to wait, given as a number or a date."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
