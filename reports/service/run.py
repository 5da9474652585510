"""The download service in a process of its own, until it is stopped."""

from collections.abc import Callable
from functools import partial
from typing import Final

from reports.access import address_of, bound, check_host, key_digests_of
from reports.http import guarded, log_requests, serve_app
from reports.locations import masked_uri
from reports.service.app import make_service

# Each holds a chunk of a file and a descriptor; more are refused.
_MOST_CONNECTIONS: Final = 256


def run_service(root: str, *, host: str | None, port: int, api_key_file: str | None, say: Callable[[str], None]) -> int:
    """Serve the runs below a root until SIGTERM or Ctrl-C; return the exit status.

    Raises:
        Refused: the root, key file or host is not usable, or the address cannot be bound.
    """
    host = check_host(host, with_key=api_key_file is not None)
    digests = key_digests_of(api_key_file) if api_key_file else ()
    app = guarded(make_service(root), key_digests=digests)
    with bound(host, port) as listening:
        found = f"{masked_uri(root)} is at {address_of(listening)}/; Ctrl-C stops it"
        log_requests()
        serve_app(app, listening, announce=partial(say, found), max_connections=_MOST_CONNECTIONS)
    say("stopped")
    return 0
