"""Who may ask: API keys, or clients of the same machine where there are none."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shortv.errors import Refused
from shortv.workers.serving.rejection import Rejected

SHORTEST_KEY = 16
# A proxy on this machine speaks for clients anywhere.
_PROXIED = (b"x-forwarded-for", b"forwarded", b"x-real-ip")


def key_digests_of(path: str | Path) -> tuple[str, ...]:
    """Read the digests of the keys in a file: one key per line, blank lines and lines that begin with # skipped.

    Raises:
        Refused: the file cannot be read, holds no key, or one that is no key.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"the API key file {str(path)!r} cannot be read: {found}; name a text file with keys") from None
    digests = dict.fromkeys(_digests(path, lines))
    if not digests:
        raise Refused(f"the API key file {str(path)!r} holds no key; write one key per line")
    return tuple(digests)


def _digests(path: str | Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        # Of a key that is refused the message must not show anything.
        if len(key) < SHORTEST_KEY:
            problem = f"has {len(key)} characters, which can be guessed; use at least {SHORTEST_KEY}"
            raise Refused(f"the key in line {number} of {str(path)!r} {problem}")
        if not key.isascii() or not key.isprintable() or " " in key:
            problem = "holds a space or a character that no HTTP header can carry; use letters and digits"
            raise Refused(f"the key in line {number} of {str(path)!r} {problem}")
        yield hashlib.sha256(key.encode()).hexdigest()


def check_key(authorization: bytes | None, digests: Sequence[str]) -> None:
    """Check the Authorization header against all keys, in a time that says nothing about them.

    Raises:
        Rejected: there is no key, or a wrong one.
    """
    scheme, _, key = (authorization or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise _unauthorized("an API key is needed; send it as 'Authorization: Bearer KEY'")
    found = hashlib.sha256(key.strip()).hexdigest()
    if not any([hmac.compare_digest(found, digest) for digest in digests]):  # a list: every key is compared
        raise _unauthorized("this API key is not one of the endpoint's; ask its operator for one")


def _unauthorized(message: str) -> Rejected:
    headers = [(b"www-authenticate", b"Bearer")]
    return Rejected(401, message, code="invalid_api_key", headers=headers)


def check_local(address: str | None, headers: Mapping[bytes, bytes]) -> None:
    """Check that a request comes from this machine and was meant for it.

    A web page can point a name of its own at 127.0.0.1 and let the browser ask for it, so the Host counts too.

    Raises:
        Rejected: it does not, or that cannot be known.
    """
    host = _host(headers.get(b"host", b"").decode("latin-1"))
    proxied = any(name in headers for name in _PROXIED)
    if proxied or not is_loopback(address or "") or not (is_loopback(host) or host.lower() == "localhost"):
        message = "without an API key file this endpoint answers only clients of its own machine, asked as localhost"
        raise Rejected(403, message + "; start it with --api-key-file", code="loopback_only")


def _host(header: str) -> str:
    """The host in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def is_loopback(address: str) -> bool:
    """Whether an IP address is of this machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)
