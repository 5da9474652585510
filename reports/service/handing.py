"""What stands below one run: its page, its manifest, its tables and plans."""

import hashlib
from typing import Final, NamedTuple
from urllib.parse import quote

from markupsafe import escape
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from reports.http import HttpError, info_of
from reports.manifest import MANIFEST_NAME, State
from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.conditions import names_tag
from reports.service.contents import PAGES, Resource, resource_of
from reports.service.files import Files, shown, why
from reports.service.finding import Found, split
from reports.service.listing import label_of
from reports.service.replies import file_reply, json_reply
from reports.service.summary import AnyManifest, Summaries, Summary, read_run
from reports.service.trees import Missing, Names, Opened, checked
from reports.training import TrainingManifest
from shortv.errors import ShortVError

PARQUET: Final = "application/vnd.apache.parquet"
# The page is a file that anybody with access to the folder may have written: it gets no part in this origin.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)
_NOTHING: Final = "there is nothing of that name; GET /runs lists what there is"


class _Ready(NamedTuple):
    """A file that may be sent."""

    opened: Opened
    digest: bytes


class Handing:
    """Finds the run in a path, and hands out what is asked of it."""

    def __init__(self, files: Files, summaries: Summaries) -> None:
        """Hand out these files."""
        self._files = files
        self._summaries = summaries

    async def below(self, request: Request) -> Response:
        """Answer for one path below /runs/."""
        path: str = request.path_params["path"]
        try:
            names = checked(tuple(path.removesuffix("/").split("/")))
            run, rest = await run_in_threadpool(split, self._files.tree, names)
            return await self._asked(request, run, rest, slash=path.endswith("/"))
        except Missing:
            raise HttpError(404, _NOTHING, code="not_found") from None
        except ShortVError as error:
            raise HttpError(422, str(error), code="unreadable") from error
        except OSError as error:
            raise HttpError(503, f"the file could not be read: {why(error)}", code="unavailable") from error

    async def _asked(self, request: Request, run: Names, rest: Names, *, slash: bool) -> Response:
        manifest = await run_in_threadpool(read_run, self._files, run)
        if not rest:
            return await self._page(request, run, manifest, PAGE_NAME) if slash else _to_folder(run)
        if slash:
            raise Missing
        if len(rest) == 1 and rest[0] in PAGES:
            return await self._page(request, run, manifest, rest[0])
        if rest[0] == "tables" and (len(rest) == 1 or (len(rest) == 2 and rest[1] in SCHEMAS)):
            return await self._tables(request, run, rest[1:])
        resource = Resource("manifest", (*run, MANIFEST_NAME)) if rest == (MANIFEST_NAME,) else resource_of(run, rest)
        if resource is None:
            raise Missing
        return await self._file(request, run, resource, manifest.state)

    async def _page(self, request: Request, run: Names, manifest: AnyManifest, page_name: str) -> Response:
        info_of(request.scope).subject = "kind=page"
        label = label_of(manifest)
        try:
            page = await run_in_threadpool(self._files.text, (*run, page_name))
        except Missing:
            problem = " ".join(filter(None, (label, _no_page(run, manifest, page_name))))
            raise HttpError(404, problem, code="no_page") from None
        lines = [f"{label} (state now: {manifest.state})"] if label else []
        lines += (await run_in_threadpool(self._look, run)).problems
        if lines:
            note = "".join(f'<p class="warning" role="status">{escape(line)}</p>' for line in lines)
            head, body, tail = page.partition(b"<body>")
            said = note.encode(errors="replace")
            page = head + body + said + tail if body else said + page
        etag = f'"{hashlib.sha256(page).hexdigest()}"'
        headers = {"content-security-policy": _PAGE_POLICY, "etag": etag, "cache-control": "private, no-cache"}
        if names_tag(request.headers.get("if-none-match", ""), etag, weak=True):
            return Response(status_code=304, headers=headers)
        return Response(page, headers=headers, media_type="text/html")

    async def _tables(self, request: Request, run: Names, tables: Names) -> Response:
        info_of(request.scope).subject = "kind=tables"
        summary = await run_in_threadpool(self._look, run)
        if summary.contents is None:
            raise HttpError(503, summary.problems[0], code="unavailable")
        found = summary.contents.parts(tables[0]) if tables else summary.contents.tables
        if tables and not found:
            raise Missing
        return json_reply({"run": shown(run), "state": summary.state, "files": [item.as_json() for item in found]})

    async def _file(self, request: Request, run: Names, resource: Resource, state: State) -> Response:
        info_of(request.scope).subject = f"kind={resource.kind}"
        try:
            opened, digest = await run_in_threadpool(self._ready, resource)
        except Missing:
            resource = await run_in_threadpool(self._only_part, run, resource)
            opened, digest = await run_in_threadpool(self._ready, resource)
        kind = PARQUET if resource.kind == "table" else "application/json"
        try:
            reply = file_reply(request, opened, digest, media_type=kind, filename=_filename(resource))
        except BaseException:
            opened.close()
            raise
        reply.headers["x-run-state"] = state
        return reply

    def _look(self, run: Names) -> Summary:
        return self._summaries.of(Found(run, self._files.tree.entries(run)))

    def _only_part(self, run: Names, resource: Resource) -> Resource:
        """Return the one file of a table that lies in a folder. Raises Missing, or HttpError for several."""
        contents = self._look(run).contents
        whole = resource.kind == "table" and len(resource.names) == len(run) + 1
        parts = contents.parts(resource.table) if contents and whole else []
        if not parts:
            raise Missing
        if len(parts) > 1:
            where = f"/runs/{shown(run)}/tables/{resource.table}"
            problem = f"{resource.table} has {len(parts)} parts; GET {where} lists them"
            raise HttpError(404, problem, code="in_parts")
        return resource._replace(names=parts[0].names)

    def _ready(self, resource: Resource) -> _Ready:
        """Open a file, check that it is whole, and find its digest."""
        if resource.kind == "plan":
            self._files.plan(resource.names)
        opened = self._files.tree.open(resource.names)
        try:
            if resource.kind == "table":
                reason = self._files.footer(resource.names, opened, resource.table).reason
                if reason is not None:
                    raise ShortVError(f"{shown(resource.names)} {reason}")
            return _Ready(opened, self._files.digest(resource.names, opened))
        except BaseException:
            opened.close()
            raise


def _no_page(run: Names, manifest: AnyManifest, page_name: str) -> str:
    """Say why a run lacks a page, and what to do."""
    name = shown(run)
    if isinstance(manifest, TrainingManifest):
        return f"{name} is a training, which has no page; GET /runs/{name}/tables lists its files"
    found, other = ("page", "") if page_name == PAGE_NAME else ("comparison", " --against OTHER")
    return f"{name} has no {found} yet; make it with `python jobs/report.py FOLDER/{name}{other}`"


def _to_folder(run: Names) -> Response:
    """Send the client to the address that the page's links are relative to."""
    return Response(status_code=308, headers={"location": f"./{quote(run[-1], safe='')}/"})


def _filename(resource: Resource) -> str:
    """Name a download after its run, so that tables of several runs can lie in one folder."""
    return "-".join(resource.names)
