"""Runs below a root over HTTP: their list, pages, Parquet tables and plans."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reports.manifest import MANIFEST_NAME
from reports.service.files import Files, why
from reports.service.finding import find_runs
from reports.service.guard import Guard
from reports.service.handing import Handing
from reports.service.listing import link_of, list_page, list_policy
from reports.service.replies import Problem, json_reply, wants_html
from reports.service.summary import Summaries, Summary, as_json
from reports.service.trees import Tree, open_tree
from shortv.errors import Refused

# Looking at a store is waiting, mostly.
_LOOKING: Final = 8
_METHODS: Final = ("GET", "HEAD")


def make_service(root: str, *, key_digests: tuple[str, ...] | None) -> Starlette:
    """Build the service over a local folder or an object-store URI.

    `key_digests` are the SHA-256 digests (hex) of accepted API keys, sent as Bearer or as the password of Basic;
    without any, only clients of this machine are answered. None leaves the check to whoever mounts the service.

    Routes: `/` and `/runs` (a page, JSON with `Accept: application/json`), `/runs.json`, and below `/runs/ID/` the
    page, `report-against.html`, `manifest.json`, `tables`, `tables/TABLE.parquet`, `tables/TABLE`,
    `tables/TABLE/PART.parquet` and `plans/NAME.json`. Symbolic links below the root are not followed.

    Raises:
        Refused: the root is no folder, or is a run itself.
    """
    tree = open_tree(root)
    try:
        inside = {entry.name for entry in tree.entries(())}
    except OSError as error:
        raise Refused(f"the folder of runs cannot be listed: {why(error)}; choose another") from error
    if MANIFEST_NAME in inside:
        raise Refused("the folder to serve is a run itself; give the folder above it")
    files = Files(tree)
    summaries = Summaries(files)
    lists, handing = _Lists(tree, summaries), Handing(files, summaries)
    app = Starlette(
        routes=[
            Route("/", lists.either, methods=_METHODS),
            Route("/runs", lists.either, methods=_METHODS),
            Route("/runs.json", lists.json, methods=_METHODS),
            Route("/runs/{path:path}", handing.below, methods=_METHODS),
        ],
        middleware=[Middleware(Guard, key_digests=key_digests)],
        exception_handlers={HTTPException: _route_problem},
    )
    app.router.redirect_slashes = False
    return app


class _Lists:
    """The list of runs in its two forms."""

    def __init__(self, tree: Tree, summaries: Summaries) -> None:
        self._tree = tree
        self._summaries = summaries

    async def either(self, request: Request) -> Response:
        """Return a page, or JSON to who asks for JSON and for no page."""
        if "application/json" in request.headers.get("accept", "") and not wants_html(request):
            return await self.json(request)
        request.scope["shortv.kind"] = "list"
        runs, complete = await run_in_threadpool(self._runs)
        headers = {"content-security-policy": list_policy(), "vary": "Accept", "cache-control": "private, no-cache"}
        return Response(list_page(runs, complete), headers=headers, media_type="text/html")

    async def json(self, request: Request) -> Response:
        """Return JSON; links are relative to the root of the service."""
        request.scope["shortv.kind"] = "list"
        runs, complete = await run_in_threadpool(self._runs)
        shape: dict[str, Any] = {"runs": [as_json(run, link_of(run.names)) for run in runs], "complete": complete}
        return json_reply(shape)

    def _runs(self) -> tuple[Sequence[Summary], bool]:
        try:
            search = find_runs(self._tree)
        except OSError as error:
            raise Problem(503, f"the folder of runs cannot be listed: {why(error)}", "unavailable") from error
        with ThreadPoolExecutor(_LOOKING, thread_name_prefix="shortv-runs") as threads:
            return list(threads.map(self._summaries.of, search.found)), search.complete


async def _route_problem(request: Request, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    known = "there is GET /runs and what it links to"
    headers = list((error.headers or {}).items())
    raise Problem(error.status_code, f"{error.detail.lower()}; {known}", "no_route", headers)
