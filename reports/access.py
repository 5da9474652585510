"""Who may call an HTTP service: holders of an API key, or clients of this machine where there are no keys."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shortv.errors import Refused

SHORTEST_KEY: Final = 16
LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = "0.0.0.0"
CHALLENGES: Final = ("Bearer", 'Basic realm="shortv: any name, an API key as password", charset="UTF-8"')
"""Values of the WWW-Authenticate headers of a reply with status 401; browsers use the second."""
# A request with one of these headers was forwarded by a proxy, so its sender may be anywhere.
_FORWARDED: Final = (b"x-forwarded-for", b"forwarded", b"x-real-ip")


def key_digests_of(path: str | Path) -> tuple[str, ...]:
    """Return the SHA-256 digests (hex) of the keys in a file: one key per line, lines that begin with # are comments.

    Raises:
        Refused: the file cannot be read, has no key, or has a line that cannot be a key.
    """
    file = f"the API key file {str(path)!r}"
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"{file} cannot be read: {found}; name a text file with keys") from None
    keys = {number: key for number, line in enumerate(lines, 1) if (key := line.strip()) and not key.startswith("#")}
    if not keys:
        raise Refused(f"{file} has no key; write one key per line")
    # The messages must not show any part of a refused key.
    for number, key in keys.items():
        if len(key) < SHORTEST_KEY:
            problem = f"has {len(key)} characters and can be guessed; use at least {SHORTEST_KEY}"
            raise Refused(f"the key in line {number} of {file} {problem}")
        if not key.isascii() or not key.isprintable() or " " in key:
            problem = "contains a space or a character that an HTTP header cannot carry; use letters and digits"
            raise Refused(f"the key in line {number} of {file} {problem}")
    return tuple(dict.fromkeys(hashlib.sha256(key.encode()).hexdigest() for key in keys.values()))


def is_accepted(key: bytes, digests: Sequence[str]) -> bool:
    """Return whether a key has one of these digests, in a time that does not depend on the keys."""
    found = hashlib.sha256(key).hexdigest()
    return any([hmac.compare_digest(found, digest) for digest in digests])  # a list: all digests are compared


def key_in(authorization: bytes | None) -> bytes:
    """Return the key of an Authorization header, `Bearer KEY` or the password of `Basic`; empty if there is none."""
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
    """Return whether a request was sent by this machine to a name of this machine.

    The Host header counts too: a web page can point its own name at 127.0.0.1 and let the browser send the request.
    """
    if any(name in headers for name in _FORWARDED) or not is_loopback(address or ""):
        return False
    named = headers.get(b"host", b"").decode("latin-1")
    host = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
    return is_loopback(host) or host.lower() == "localhost"


def is_loopback(address: str) -> bool:
    """Return whether an IP address belongs to this machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def check_host(host: str | None, *, with_key: bool) -> str:
    """Return the address to bind to. Raises Refused for any address but loopback if the service has no keys."""
    if host is None:
        return EVERYWHERE if with_key else LOOPBACK
    if not with_key and host != "localhost" and not is_loopback(host):
        problem = f"--host {host} would answer clients of other machines without a key"
        raise Refused(f"{problem}; give --api-key-file, or leave --host out for {LOOPBACK}")
    return host


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a TCP socket for the time of the block. Raises Refused if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it short replies wait for 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise Refused(f"{host}:{port} cannot be bound: {error.strerror}; choose another address") from error
        yield listening


def address_of(listening: socket.socket) -> str:
    """Return where this machine reaches a bound socket, as `http://HOST:PORT`."""
    host, port = listening.getsockname()[:2]
    shown = LOOPBACK if host == EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
