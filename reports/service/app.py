"""Runs below a root over HTTP: their list, pages, Parquet tables and plans."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from reports.http import HttpError, accepts_html, info_of
from reports.manifest import MANIFEST_NAME
from reports.service.files import Files, why
from reports.service.finding import find_runs
from reports.service.handing import Handing
from reports.service.listing import link_of, list_page, list_policy
from reports.service.replies import json_reply
from reports.service.summary import Summaries, Summary, as_json
from reports.service.trees import Tree, open_tree
from shortv.errors import Refused

# Looking at a store is waiting, mostly.
_LOOKING: Final = 8
_METHODS: Final = ("GET", "HEAD")


def make_service(root: str) -> Router:
    """Build the service over a local folder or an object-store URI; it must be behind a Guard.

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
    return Router(
        redirect_slashes=False,
        routes=[
            Route("/", lists.either, methods=_METHODS),
            Route("/runs", lists.either, methods=_METHODS),
            Route("/runs.json", lists.json, methods=_METHODS),
            Route("/runs/{path:path}", handing.below, methods=_METHODS),
        ],
    )


class _Lists:
    """The list of runs in its two forms."""

    def __init__(self, tree: Tree, summaries: Summaries) -> None:
        self._tree = tree
        self._summaries = summaries

    async def either(self, request: Request) -> Response:
        """Return a page, or JSON to who asks for JSON and for no page."""
        if "application/json" in request.headers.get("accept", "") and not accepts_html(request.scope):
            return await self.json(request)
        info_of(request.scope).subject = "kind=list"
        runs, complete = await run_in_threadpool(self._runs)
        headers = {"content-security-policy": list_policy(), "vary": "Accept", "cache-control": "private, no-cache"}
        return Response(list_page(runs, complete), headers=headers, media_type="text/html")

    async def json(self, request: Request) -> Response:
        """Return JSON; links are relative to the root of the service."""
        info_of(request.scope).subject = "kind=list"
        runs, complete = await run_in_threadpool(self._runs)
        shape: dict[str, Any] = {"runs": [as_json(run, link_of(run.names)) for run in runs], "complete": complete}
        return json_reply(shape)

    def _runs(self) -> tuple[Sequence[Summary], bool]:
        try:
            search = find_runs(self._tree)
        except OSError as error:
            raise HttpError(503, f"the folder of runs cannot be listed: {why(error)}", code="unavailable") from error
        with ThreadPoolExecutor(_LOOKING, thread_name_prefix="shortv-runs") as threads:
            return list(threads.map(self._summaries.of, search.found)), search.complete
