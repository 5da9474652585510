"""API keys, kept and compared as digests, and what counts as a request from this machine where there are none."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shortv.errors import Refused
from shortv.listening import is_loopback

SHORTEST_KEY = 16
# A proxy on this machine speaks for clients anywhere.
_PROXIED = (b"x-forwarded-for", b"forwarded", b"x-real-ip")
# Both ways to send a key; a browser asks its user for the second one, and sends what stands in its password field.
CHALLENGES = ("Bearer", 'Basic realm="shortv: any name, an API key as password", charset="UTF-8"')
"""Values of the WWW-Authenticate headers that come with status 401."""


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


def is_accepted(key: bytes, digests: Sequence[str]) -> bool:
    """Whether a key is one of those with these digests, found in a time that says nothing about them."""
    found = hashlib.sha256(key).hexdigest()
    return any([hmac.compare_digest(found, digest) for digest in digests])  # a list: every key is compared


def key_in(authorization: bytes | None) -> bytes:
    """The key in an Authorization header, `Bearer KEY` or the password of `Basic`; nothing where there is none."""
    scheme, _, sent = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return sent.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(sent.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def is_local(address: str | None, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request comes from this machine and was meant for it.

    A web page can point a name of its own at 127.0.0.1 and let the browser ask for it, so the Host counts too.
    """
    host = _host(headers.get(b"host", b"").decode("latin-1"))
    if any(name in headers for name in _PROXIED) or not is_loopback(address or ""):
        return False
    return is_loopback(host) or host.lower() == "localhost"


def _host(header: str) -> str:
    """The host in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
