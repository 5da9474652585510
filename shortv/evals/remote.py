"""Requests to replicas by URL: OpenAI's chat completions with this project's one vendor field."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import openai
from pydantic import Field, field_validator, model_validator

from shortv.errors import Refused, ShortVError, one_line
from shortv.evals.dispatch import Client
from shortv.request import FULL_MODEL, Completion, Failure, Likelihood, Message, Reason, Request, SamplingParams
from shortv.spec import Count, Seconds, Spec
from shortv.untrusted import read_file

VENDOR: Final = "shortv"
_DEFAULTS: Final = asdict(SamplingParams())
_OPENAI_SETTINGS: Final = ("top_p", "seed", "stop")
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
_TIMES: Final = ("queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms")
_RETRIES: Final = 20
_CONNECT_S: Final = 10.0
# The endpoint's own time limit should end a request first.
_SLACK_S: Final = 5.0
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class ServedSpec(Spec):
    """Settings of the model `shortv_serve`: where the replicas are, and as which model they get requests."""

    url: str | None = Field(None, description="OpenAI-style endpoint, such as http://127.0.0.1:8000/v1.")
    app: str | None = Field(None, description="Name of a running Serve application, instead of a URL.")
    model: str | None = Field(None, description="Name of the model on the endpoint: NAME or NAME@PLAN.")
    plan: str = Field(FULL_MODEL, description="Name of the plan; empty for the full model.")
    plan_digest: str | None = Field(None, description="Digest that the plan must have, or its first 12 characters.")
    num_concurrent: Count = Field(32, description="Most requests in flight.")
    timeout: Seconds = Field(600.0, description="Time limit of a request, in seconds.")
    api_key_file: str | None = Field(None, description="File with the endpoint's key on its first line.")

    @model_validator(mode="before")
    @classmethod
    def _split_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        base, _, named = str(values.get("model") or "").partition("@")
        plan = values.get("plan")
        if plan and named and plan != named:
            raise ValueError(f"model={values['model']} and plan={plan} name different plans; name one")
        return {**values, "model": base or None, "plan": named or plan or FULL_MODEL}

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        if (self.url is None) == (self.app is None):
            raise ValueError("give url=http://HOST:PORT/v1 or app=NAME, one of them")
        return self

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.password:
            # The message must not repeat the value.
            raise Refused("the url contains a password, which result files would show; use api_key_file=FILE")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not the address of an endpoint; give one such as http://127.0.0.1:8000/v1")
        return value.rstrip("/")

    @property
    def served_name(self) -> str | None:
        """The name of model and plan on an endpoint."""
        return f"{self.model}@{self.plan}" if self.model and self.plan else self.model

    def api_key(self) -> str | None:
        """Return the first word of the key file. Raises Refused when the file cannot be read or is empty."""
        if self.api_key_file is None:
            return None
        content = read_file(self.api_key_file, what="api_key_file", limit_bytes=1 << 16)
        words = content.decode("ascii", "replace").split()
        if not words:
            raise Refused(f"api_key_file={self.api_key_file} is empty; put the key on its first line")
        return words[0]


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
        """Fail: OpenAI's form has no place for a continuation."""
        message = (
            "a URL cannot carry likelihood, which this task needs; use app=NAME, or the model shortv in one process"
        )
        return Failure(reason=Reason.INVALID, message=message)

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
    """Return the JSON body of a request, whose images are PNG files."""
    sampling = asdict(request.sampling)
    changed = {name: value for name, value in sampling.items() if value != _DEFAULTS[name]}
    body = {
        "model": model,
        "messages": [_message(message) for message in request.messages],
        "max_tokens": sampling["max_tokens"],
        "temperature": sampling["temperature"],
    }
    body |= {name: changed[name] for name in _OPENAI_SETTINGS if name in changed}
    own = {name: changed[name] for name in _VENDOR_SETTINGS if name in changed}
    return body | ({VENDOR: own} if own else {})


def _message(message: Message) -> dict[str, Any]:
    # A text alone is what every endpoint understands in every role.
    alone = len(message.parts) == 1 and isinstance(message.parts[0], str)
    return {"role": message.role, "content": message.parts[0] if alone else [_part(part) for part in message.parts]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = base64.b64encode(part).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def completion_of(body: Any) -> Completion | Failure:
    """Read a response. One in another form, or without a whole completion, is a failure and not an empty completion."""
    try:
        choice = body["choices"][0]
        text, finish_reason = choice["message"]["content"], choice["finish_reason"]
        usage, own = body.get("usage") or {}, body.get(VENDOR) or {}
        times: dict[str, Any] = {name: float(own.get(name, 0.0)) for name in _TIMES}
        if not isinstance(text, str) or finish_reason not in ("stop", "length"):
            found = f"finish_reason {finish_reason!r:.80} and {type(text).__name__} as text"
            return Failure(reason=Reason.INTERNAL, message=f"the endpoint's response has {found}")
        return Completion(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            visual_tokens=int(usage.get("visual_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            plan_digest=own.get("plan_digest"),
            exit_layer=None if own.get("exit_layer") is None else int(own["exit_layer"]),
            **times,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        message = f"the endpoint's response is not in OpenAI's form ({type(error).__name__}: {one_line(error)})"
        return Failure(reason=Reason.INTERNAL, message=message)


def _failure_of(error: openai.APIStatusError) -> Failure:
    body = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    said = f": {' '.join(str(message).split())[:300]}" if message else ""
    return Failure(reason=_reason(error.status_code), message=f"the endpoint says {error.status_code}{said}")


def _reason(status: int) -> Reason:
    return _REASONS.get(status, Reason.INTERNAL if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Reason.INVALID)
