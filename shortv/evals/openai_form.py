"""Questions and answers in the form of OpenAI's chat completions, with this project's one vendor field."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams, TokenLogprob

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
_MAGIC: Final = ((b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))


def body_of(request: Request, model: str) -> dict[str, Any]:
    """The body of a request; images must be encoded."""
    decoding = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(turn) for turn in request.messages],
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
    }
    if decoding.top_p != _DEFAULTS.top_p:
        body["top_p"] = decoding.top_p
    if decoding.seed is not None:
        body["seed"] = decoding.seed
    if decoding.stop:
        body["stop"] = list(decoding.stop)
    if decoding.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": decoding.top_logprobs}
    own = {name: getattr(decoding, name) for name in _VENDOR_SETTINGS}
    if own := {name: value for name, value in own.items() if value != getattr(_DEFAULTS, name)}:
        body[VENDOR] = own
    return body


def _message(turn: Message) -> dict[str, Any]:
    # A text alone is what every endpoint understands in every role.
    alone = len(turn.parts) == 1 and isinstance(turn.parts[0], str)
    return {"role": turn.role, "content": turn.parts[0] if alone else [_part(part) for part in turn.parts]}


def _part(part: object) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, bytes):
        raise TypeError(f"a part of a turn is a {type(part).__name__}; encode images before they are sent")
    kind = next((kind for magic, kind in _MAGIC if part.startswith(magic)), "png")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(part).decode()}"}}


def answer_of(body: Any) -> Completion | Failure:
    """Read a response. A body that is no answer, or one that was broken off, is a failure and no empty answer."""
    try:
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        usage, own = body.get("usage") or {}, body.get(VENDOR) or {}
        if not isinstance(text, str) or finish not in ("stop", "length"):
            return _internal(f"the endpoint's answer has finish_reason {finish!r} and {type(text).__name__} as text")
        return Completion(
            text=text,
            finish_reason=finish,
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
        return _internal(f"the endpoint's answer is not in OpenAI's form ({type(error).__name__}: {error})")


def _logprobs(found: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            item["token"],
            item["logprob"],
            tuple((other["token"], other["logprob"]) for other in item.get("top_logprobs") or ()),
        )
        for item in (found or {}).get("content") or ()
    )


def failure_of(status: int, body: Any) -> Failure:
    """Read an error response."""
    error = body.get("error") if isinstance(body, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else None
    told = f": {' '.join(str(message).split())[:300]}" if message else ""
    reason = _REASONS.get(status, Reason.INTERNAL if status >= HTTPStatus.INTERNAL_SERVER_ERROR else Reason.INVALID)
    return Failure(reason=reason, message=f"the endpoint says {status}{told}")


def _internal(message: str) -> Failure:
    return Failure(reason=Reason.INTERNAL, message=message)
