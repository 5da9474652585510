"""The service in a process of its own, until it is stopped."""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Final

import uvicorn
from starlette.applications import Starlette

from reports.locations import masked_uri
from reports.service.app import make_service
from shortv.api_keys import key_digests_of
from shortv.listening import address_of, bound, check_host

# Each holds a chunk of a file and a descriptor; more are turned away.
_MOST_CONNECTIONS: Final = 256


def run_service(root: str, *, host: str | None, port: int, api_key_file: str | None, say: Callable[[str], None]) -> int:
    """Serve the runs below a root until SIGTERM or Ctrl-C; return the exit status.

    Raises:
        Refused: a root, key file or host that cannot be right, or an address that cannot be bound.
    """
    host = check_host(host, with_key=api_key_file is not None)
    digests = key_digests_of(api_key_file) if api_key_file else ()
    app = make_service(root, key_digests=digests)
    with bound(host, port) as listening:
        found = f"{masked_uri(root)} is at {address_of(listening)}/; Ctrl-C stops it"
        asyncio.run(_listen(app, listening, partial(say, found)))
    say("stopped")
    return 0


async def _listen(app: Starlette, listening: socket.socket, say: Callable[[], None]) -> None:
    """Answer until a signal comes, then let running downloads end, for a while."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        say()
    await serving


class _Server(uvicorn.Server):
    """A server for which a signal is a way to end, and not raised again afterwards."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, at the second signal without waiting for downloads."""
        self.force_exit = self.should_exit
        self.should_exit = True
