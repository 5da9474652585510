"""The address that a service listens on: loopback unless keys guard it."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shortv.errors import Refused

LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = "0.0.0.0"


def is_loopback(address: str) -> bool:
    """Whether an IP address is of this machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def check_host(host: str | None, *, with_key: bool) -> str:
    """The address to bind to. Raises Refused for any but loopback where no key guards the service."""
    if host is None:
        return EVERYWHERE if with_key else LOOPBACK
    if not with_key and host != "localhost" and not is_loopback(host):
        raise Refused(f"--host {host} would answer anybody; give --api-key-file, or leave --host out for {LOOPBACK}")
    return host


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the address from now on. Raises Refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise Refused(f"{host}:{port} cannot be bound: {error.strerror}; choose another address") from error
        yield listening


def address_of(listening: socket.socket) -> str:
    """Where this machine reaches a bound socket, as `http://HOST:PORT`."""
    host, port = listening.getsockname()[:2]
    shown = LOOPBACK if host == EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
