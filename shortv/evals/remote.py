"""Requests to replicas by URL: OpenAI's chat completions with this project's one vendor field."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import openai

from shortv.errors import Refused, ShortVError, one_line
from shortv.evals.dispatch import Client
from shortv.evals.model_args import ServedSpec
from shortv.request import Completion, Failure, Likelihood, Message, Reason, Request, SamplingParams, TokenLogprob

VENDOR: Final = "shortv"
_DEFAULTS: Final = SamplingParams()
# The vendor field carries what OpenAI's form has no name for.
_VENDOR_SETTINGS: Final = ("top_k", "min_tokens", "repetition_penalty")
_REASONS: Final[Mapping[int, Reason]] = {
    HTTPStatus.TOO_MANY_REQUESTS: Reason.OVERLOADED,
    HTTPStatus.SERVICE_UNAVAILABLE: Reason.OVERLOADED,
    HTTPStatus.NOT_FOUND: Reason.UNKNOWN_PLAN,
    HTTPStatus.REQUEST_TIMEOUT: Reason.DEADLINE,
    HTTPStatus.GATEWAY_TIMEOUT: Reason.DEADLINE,
    HTTPStatus.BAD_GATEWAY: Reason.LOST,
}
_FORMATS: Final = ((b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))
_RETRIES: Final = 20
_CONNECT_S: Final = 10.0
# The endpoint's own time limit should end a request first.
_SLACK_S: Final = 5.0
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class Connection(NamedTuple):
    """A client, the plan that its requests name, and that plan's digest on the replicas (None: no plan, or unknown)."""

    client: Client
    plan: str
    plan_digest: str | None


class RemoteClient:
    """Sends requests to an endpoint; what may pass (429, 503, lost connections) is tried again until the time limit."""

    def __init__(self, endpoint: openai.AsyncOpenAI, model: str) -> None:
        """Take an endpoint, as `open_endpoint` returns it, and the full model's name there."""
        self._endpoint = endpoint
        self._model = model

    async def complete(self, request: Request) -> Completion | Failure:
        """Complete a conversation within its time limit, waiting where the endpoint says so."""
        model = f"{self._model}@{request.plan}" if request.plan else self._model
        try:
            async with asyncio.timeout(request.timeout_s + _SLACK_S):
                body = await self._endpoint.post("/chat/completions", body=body_of(request, model), cast_to=object)
        except (TimeoutError, openai.APITimeoutError):
            return Failure(reason=Reason.DEADLINE, message="the endpoint gave no answer in time")
        except openai.APIStatusError as error:
            return _failure_of(error)
        except openai.APIConnectionError as error:
            message = f"no connection to the endpoint: {one_line(error.__cause__ or error)}"
            return Failure(reason=Reason.LOST, message=message)
        return completion_of(body)

    async def score(self, request: Request) -> Likelihood | Failure:
        """Refused: OpenAI's form has no place for a continuation."""
        raise Refused(
            "a URL cannot carry likelihood, which this task needs; use app=NAME, or the model shortv in one process"
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.close()


def open_endpoint(url: str, key: str | None) -> openai.AsyncOpenAI:
    """Return OpenAI's client for an endpoint, with its retries and its pauses between them."""

    async def decide(response: Any) -> None:
        # By itself the client would repeat what fails for good: a model that fails, a time limit that is over.
        passing = Failure(reason=_reason(response.status_code), message="").passing
        response.headers["x-should-retry"] = str(passing).lower()

    # A proxy of the environment leads away from this machine.
    trust_env = urlsplit(url).hostname not in _LOOPBACK
    http = openai.DefaultAsyncHttpxClient(
        trust_env=trust_env, follow_redirects=False, timeout=None, event_hooks={"response": [decide]}
    )
    # Empty texts and the key "none" keep what the environment holds for OpenAI from other hosts.
    return openai.AsyncOpenAI(
        base_url=url, api_key=key or "none", organization="", project="", max_retries=_RETRIES, http_client=http
    )


async def connect_url(spec: ServedSpec) -> Connection:
    """Connect to `spec.url` and find the model and its plan among those it lists.

    Raises:
        Refused: the endpoint has no such model or plan, or does not accept the key.
        ShortVError: it cannot be reached, or does not list models.
    """
    endpoint = open_endpoint(spec.url or "", spec.api_key())
    try:
        models = await _models(endpoint, spec.url or "")
        name = spec.served_name
        if name not in models:
            given = f"has no model {name!r}" if name else "needs the name of a model"
            raise Refused(f"{spec.url} {given}; set model= to one of {', '.join(sorted(models)) or 'none'}")
        digest = (models[name].get(VENDOR) or {}).get("plan_digest")
        if spec.plan and digest is None:
            raise Refused(f"{spec.url} does not say which plan {name!r} is; use an endpoint of jobs/serve.py")
    except BaseException:
        await endpoint.close()
        raise
    return Connection(RemoteClient(endpoint, spec.model or ""), spec.plan, digest)


async def _models(endpoint: openai.AsyncOpenAI, url: str) -> dict[str, Mapping[str, Any]]:
    try:
        async with asyncio.timeout(_CONNECT_S):
            body: Any = await endpoint.with_options(max_retries=0).get("/models", cast_to=object)
        return {str(entry["id"]): entry for entry in body["data"]}
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise Refused(f"{url} does not accept the key; give its file with api_key_file=FILE") from None
    except (TimeoutError, openai.APIConnectionError) as error:
        why = one_line(error.__cause__ or error)
        raise ShortVError(f"{url} cannot be reached: {why}; is the endpoint running?") from error
    except (openai.APIError, KeyError, TypeError) as error:
        status = getattr(error, "status_code", 200)
        raise ShortVError(
            f"{url}/models answers {status} and does not list models; is it an OpenAI-style endpoint?"
        ) from error


def body_of(request: Request, model: str) -> dict[str, Any]:
    """Return the JSON body of a request; its images must be encoded."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in request.messages],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.top_p != _DEFAULTS.top_p:
        body["top_p"] = sampling.top_p
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    own = {name: getattr(sampling, name) for name in _VENDOR_SETTINGS}
    if own := {name: value for name, value in own.items() if value != getattr(_DEFAULTS, name)}:
        body[VENDOR] = own
    return body


def _message(message: Message) -> dict[str, Any]:
    # A text alone is what every endpoint understands in every role.
    alone = len(message.parts) == 1 and isinstance(message.parts[0], str)
    return {"role": message.role, "content": message.parts[0] if alone else [_part(part) for part in message.parts]}


def _part(part: object) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, bytes):
        raise TypeError(f"a part of a message is a {type(part).__name__}; encode images before they are sent")
    kind = next((kind for magic, kind in _FORMATS if part.startswith(magic)), "png")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(part).decode()}"}}


def completion_of(body: Any) -> Completion | Failure:
    """Read a response. One in another form, or without a whole completion, is a failure and not an empty completion."""
    try:
        choice = body["choices"][0]
        text, finish_reason = choice["message"]["content"], choice["finish_reason"]
        usage, own = body.get("usage") or {}, body.get(VENDOR) or {}
        if not isinstance(text, str) or finish_reason not in ("stop", "length"):
            found = f"finish_reason {finish_reason!r:.80} and {type(text).__name__} as text"
            return _internal(f"the endpoint's response has {found}")
        return Completion(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            visual_tokens=int(usage.get("visual_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            plan_digest=own.get("plan_digest"),
            queue_ms=float(own.get("queue_ms", 0.0)),
            prefill_ms=float(own.get("prefill_ms", 0.0)),
            decode_ms=float(own.get("decode_ms", 0.0)),
            exit_layer=None if own.get("exit_layer") is None else int(own["exit_layer"]),
            logprobs=_logprobs(choice.get("logprobs")),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return _internal(f"the endpoint's response is not in OpenAI's form ({type(error).__name__}: {one_line(error)})")


def _logprobs(found: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            item["token"],
            item["logprob"],
            tuple((other["token"], other["logprob"]) for other in item.get("top_logprobs") or ()),
        )
        for item in (found or {}).get("content") or ()
    )


def _failure_of(error: openai.APIStatusError) -> Failure:
    body = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    said = f": {' '.join(str(message).split())[:300]}" if message else ""
    return Failure(reason=_reason(error.status_code), message=f"the endpoint says {error.status_code}{said}")


def _reason(status: int) -> Reason:
    return _REASONS.get(status, Reason.INTERNAL if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Reason.INVALID)


def _internal(message: str) -> Failure:
    return Failure(reason=Reason.INTERNAL, message=message)
