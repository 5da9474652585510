"""Clients of a service in the same process."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.routing import Mount

from reports.http import guarded
from reports.service import make_service

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def ask(
    root: Path | str, path: str, *, method: str = "GET", headers: Any = None, keys: tuple[str, ...] = ()
) -> httpx.Response:
    """Ask once for a path that is sent as it stands."""
    return ask_all(root, [(method, path, headers or {})], keys=keys)[0]


def ask_all(root: Path | str, asked: list[tuple[str, str, Any]], *, keys: tuple[str, ...] = ()) -> list[httpx.Response]:
    """Ask one service several times: method, path, headers."""
    app = guarded([Mount("/", make_service(str(root)))], key_digests=keys)
    sent = ""

    async def as_it_stands(scope: Any, receive: Any, send: Any) -> None:
        # httpx tidies paths up; a server decodes them once and leaves them alone.
        raw = sent.partition("?")[0].encode()
        await app({**scope, "path": unquote(raw.decode("latin-1")), "raw_path": raw}, receive, send)

    async def run() -> list[httpx.Response]:
        nonlocal sent
        found = []
        transport = httpx.ASGITransport(as_it_stands, client=("127.0.0.1", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, sent, headers in asked:  # noqa: B007
                found.append(await client.request(method, "/", headers=headers))
        return found

    return asyncio.run(run())


def listed(root: Path | str) -> dict[str, Any]:
    """The runs of the list by id."""
    return {run["id"]: run for run in ask(root, "/runs.json").json()["runs"]}
