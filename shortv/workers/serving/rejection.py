"""Why a request gets no answer, in the form that OpenAI's clients understand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from shortv.request import Failure, Reason

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_STATUSES = {
    Reason.INVALID: 400,
    Reason.UNKNOWN_PLAN: 404,
    Reason.OVERLOADED: 503,
    Reason.DEADLINE: 504,
    Reason.LOST: 503,
    Reason.INTERNAL: 500,
}
CLIENT_GONE = 499
"""The status in the log of a request whose client went away."""


class Rejected(Exception):
    """A request ends with this HTTP status; the message is one line for the caller.

    `param` names the field that is wrong, `code` is a short kind that programs can compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = [(b"content-type", b"application/json"), *headers]
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()


def rejection_of(failure: Failure, retry_after_s: int) -> Rejected:
    """What a replica's failure is over HTTP."""
    headers = [retry_after(retry_after_s)] if failure.passing else []
    code = "model_not_found" if failure.reason is Reason.UNKNOWN_PLAN else str(failure.reason).replace("-", "_")
    return Rejected(_STATUSES[failure.reason], failure.message, code=code, headers=headers)


def retry_after(seconds: int) -> tuple[bytes, bytes]:
    """The header that says when to ask again."""
    return b"retry-after", str(seconds).encode()


def too_late(seconds: float) -> Rejected:
    """The answer was not whole in time."""
    return Rejected(504, f"the answer was not complete within {seconds:g} s; ask for fewer tokens", code="deadline")


def client_gone() -> Rejected:
    """Nobody waits for the answer any more."""
    return Rejected(CLIENT_GONE, "the client went away", code="client_gone")
