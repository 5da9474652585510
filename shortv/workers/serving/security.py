"""Who may ask the endpoint: holders of a key, or clients of the same machine where there are no keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reports.access import CHALLENGES, is_accepted, is_local, key_in
from shortv.workers.serving.rejection import Rejected


def check_key(authorization: bytes | None, digests: Sequence[str]) -> None:
    """Check the Authorization header against all keys, in a time that says nothing about them.

    Raises:
        Rejected: there is no key, or a wrong one.
    """
    key = key_in(authorization)
    if not key:
        raise _unauthorized("an API key is needed; send it as 'Authorization: Bearer KEY'")
    if not is_accepted(key, digests):
        raise _unauthorized("this API key is not one of the endpoint's; ask its operator for one")


def _unauthorized(message: str) -> Rejected:
    headers = [(b"www-authenticate", challenge.encode()) for challenge in CHALLENGES]
    return Rejected(401, message, code="invalid_api_key", headers=headers)


def check_local(address: str | None, headers: Mapping[bytes, bytes]) -> None:
    """Check that a request comes from this machine and was meant for it.

    Raises:
        Rejected: it does not, or that cannot be known.
    """
    if not is_local(address, headers):
        message = "without an API key file this endpoint answers only clients of its own machine, asked as localhost"
        raise Rejected(403, message + "; start it with --api-key-file", code="loopback_only")
