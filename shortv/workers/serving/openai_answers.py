"""Answers in the form of OpenAI's API: whole, and in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortv.request import Completion, TokenLogprob

# JSON has no infinity; OpenAI writes this for a token that cannot come.
_LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What all bodies of one answer have in common."""

    completion_id: str
    created: int
    model: str
    plan: str
    with_logprobs: bool

    def whole(self, answer: Completion) -> bytes:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }
        body = {**self._head("chat.completion"), "choices": [choice]}
        return to_json({**body, "usage": _usage(answer), "shortv": self._vendor(answer)})

    def first_chunk(self) -> bytes:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The next part of the text."""
        return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))

    def last_chunks(self, answer: Completion, include_usage: bool) -> bytes:
        """Why the answer ended, what it cost, and the end of the stream."""
        last = self._chunk({}, finish=answer.finish_reason, shortv=self._vendor(answer))
        if not include_usage:
            return last + DONE
        usage = {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(answer)}
        return last + event(to_json(usage)) + DONE

    def _chunk(
        self, delta: Mapping[str, Any], *, logprobs: Any = None, finish: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(to_json({**self._head("chat.completion.chunk"), "choices": [choice], **more}))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.completion_id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {**_entry(one.token, one.logprob), "top_logprobs": [_entry(*other) for other in one.top]} for one in found
        ]
        return {"content": content, "refusal": None}

    def _vendor(self, answer: Completion) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "plan_digest": answer.plan_digest,
            "exit_layer": answer.exit_layer,
            "queue_ms": round(answer.queue_ms, 3),
            "prefill_ms": round(answer.prefill_ms, 3),
            "decode_ms": round(answer.decode_ms, 3),
        }


def model_card(name: str, plan: str, digest: str | None, created: int) -> dict[str, Any]:
    """A model in the list of models."""
    vendor = {"plan": plan, "plan_digest": digest}
    return {"id": name, "object": "model", "created": created, "owned_by": "shortv", "shortv": vendor}


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


def to_json(body: Mapping[str, Any]) -> bytes:
    """Encode a body; ValueError for numbers that JSON does not have."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _usage(answer: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "visual_tokens": answer.visual_tokens,
    }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    value = _LEAST_LOGPROB if logprob == -math.inf else logprob
    return {"token": token, "logprob": value, "bytes": list(token.encode("utf-8", "surrogatepass"))}
