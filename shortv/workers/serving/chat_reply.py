"""Completions in the form of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortv.request import Completion, TokenLogprob

# JSON has no infinity; OpenAI writes this for a token of probability 0.
_LEAST_LOGPROB = -9999.0
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyForm:
    """What all bodies of the reply to one request have in common."""

    completion_id: str
    created: int
    model: str
    plan: str
    with_logprobs: bool

    def whole(self, completion: Completion) -> bytes:
        """The body of a completion that is not streamed."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        logprobs = self._logprobs(completion.logprobs)
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}
        body = {**self._head("chat.completion"), "choices": [choice]}
        return to_json({**body, "usage": _usage(completion), "shortv": self._vendor(completion)})

    def first_chunk(self) -> bytes:
        """The event that begins a stream and names the role."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The event with the next part of the text."""
        return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))

    def last_chunks(self, completion: Completion, *, include_usage: bool) -> bytes:
        """The events with the reason of the end and the usage, and the end of the stream."""
        last = self._chunk({}, finish=completion.finish_reason, shortv=self._vendor(completion))
        if not include_usage:
            return last + _DONE
        usage = {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(completion)}
        return last + _event(usage) + _DONE

    def _chunk(
        self, delta: Mapping[str, Any], *, logprobs: Any = None, finish: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.completion_id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {**_entry(one.token, one.logprob), "top_logprobs": [_entry(*other) for other in one.top]} for one in found
        ]
        return {"content": content, "refusal": None}

    def _vendor(self, completion: Completion) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "plan_digest": completion.plan_digest,
            "exit_layer": completion.exit_layer,
            "queue_ms": round(completion.queue_ms, 3),
            "prefill_ms": round(completion.prefill_ms, 3),
            "decode_ms": round(completion.decode_ms, 3),
        }


def model_card(name: str, plan: str, digest: str | None, created: int) -> dict[str, Any]:
    """A model in the list of models."""
    vendor = {"plan": plan, "plan_digest": digest}
    return {"id": name, "object": "model", "created": created, "owned_by": "shortv", "shortv": vendor}


def to_json(body: Mapping[str, Any]) -> bytes:
    """Encode a body. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"


def _usage(completion: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        "visual_tokens": completion.visual_tokens,
    }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    value = _LEAST_LOGPROB if logprob == -math.inf else logprob
    return {"token": token, "logprob": value, "bytes": list(token.encode("utf-8", "surrogatepass"))}
