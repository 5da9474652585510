"""What stands below one run: its page, its manifest, its tables and plans."""

import hashlib
from typing import Final, NamedTuple
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from reports.manifest import MANIFEST_NAME
from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.conditions import names_tag
from reports.service.contents import Resource, contents_of, parts_of, resource_of
from reports.service.files import Files, shown, why
from reports.service.finding import split
from reports.service.listing import label_of
from reports.service.replies import Problem, file_reply, json_reply
from reports.service.summary import AnyManifest, read_run
from reports.service.trees import Missing, Names, Opened, checked
from shortv.errors import ShortVError
from shortv.planfile import parse_plan

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

    def __init__(self, files: Files) -> None:
        """Hand out files of these."""
        self._files = files

    async def below(self, request: Request) -> Response:
        """Answer for one path below /runs/."""
        path: str = request.path_params["path"]
        try:
            names = checked(tuple(path.removesuffix("/").split("/")))
            run, rest = await run_in_threadpool(split, self._files.tree, names)
            return await self._asked(request, run, rest, slash=path.endswith("/"))
        except Missing:
            raise Problem(404, _NOTHING, "not_found") from None
        except ShortVError as error:
            raise Problem(422, str(error), "unreadable") from error
        except OSError as error:
            raise Problem(503, f"the file could not be read: {why(error)}", "unavailable") from error

    async def _asked(self, request: Request, run: Names, rest: Names, *, slash: bool) -> Response:
        manifest = await run_in_threadpool(read_run, self._files, run)
        if not rest:
            return await self._page(request, run, manifest) if slash else _to_folder(run)
        if slash:
            raise Missing
        if rest == (PAGE_NAME,):
            return await self._page(request, run, manifest)
        if rest[0] == "tables" and (len(rest) == 1 or (len(rest) == 2 and rest[1] in SCHEMAS)):
            return await self._tables(request, run, rest[1:])
        resource = Resource("manifest", (*run, MANIFEST_NAME)) if rest == (MANIFEST_NAME,) else resource_of(run, rest)
        if resource is None:
            raise Missing
        return await self._file(request, resource)

    async def _page(self, request: Request, run: Names, manifest: AnyManifest) -> Response:
        request.scope["shortv.kind"] = "page"
        label, name = label_of(manifest), shown(run)
        try:
            page = await run_in_threadpool(self._files.text, (*run, PAGE_NAME))
        except Missing:
            how = f"{name} has no page yet; make it with `python jobs/report.py FOLDER/{name}`"
            raise Problem(404, f"{label} {how}" if label else how, "no_page") from None
        if label:
            note = f'<p class="warning" role="status">{label} (state now: {manifest.state})</p>'.encode()
            head, body, tail = page.partition(b"<body>")
            page = head + body + note + tail if body else note + page
        etag = f'"{hashlib.sha256(page).hexdigest()}"'
        headers = {"content-security-policy": _PAGE_POLICY, "etag": etag, "cache-control": "private, no-cache"}
        if names_tag(request.headers.get("if-none-match", ""), etag, weak=True):
            return Response(status_code=304, headers=headers)
        return Response(page, headers=headers, media_type="text/html")

    async def _tables(self, request: Request, run: Names, tables: Names) -> Response:
        request.scope["shortv.kind"] = "tables"
        if tables:
            found = await run_in_threadpool(parts_of, self._files, run, tables[0])
            if not found:
                raise Missing
        else:
            entries = await run_in_threadpool(self._files.tree.entries, run)
            found = list((await run_in_threadpool(contents_of, self._files, run, entries)).tables)
        return json_reply({"run": shown(run), "files": [item.as_json() for item in found]})

    async def _file(self, request: Request, resource: Resource) -> Response:
        request.scope["shortv.kind"] = resource.kind
        opened, digest = await run_in_threadpool(self._ready, resource)
        kind = PARQUET if resource.kind == "table" else "application/json"
        try:
            return file_reply(request, opened, digest, media_type=kind, filename=_filename(resource))
        except BaseException:
            opened.close()
            raise

    def _ready(self, resource: Resource) -> _Ready:
        """Open a file, check that it is whole, and find its digest."""
        if resource.kind == "plan":
            try:
                parse_plan(self._files.text(resource.names).decode(errors="replace"))
            except ShortVError as error:
                raise ShortVError(f"{shown(resource.names)}: {error}") from error
        opened = self._files.tree.open(resource.names)
        try:
            if resource.kind == "table":
                problem = self._files.footer(resource.names, opened, resource.table).problem
                if problem is not None:
                    raise ShortVError(problem)
            return _Ready(opened, self._files.digest(resource.names, opened))
        except BaseException:
            opened.close()
            raise


def _to_folder(run: Names) -> Response:
    """Send the client to the address that the page's links are relative to."""
    return Response(status_code=308, headers={"location": f"./{quote(run[-1], safe='')}/"})


def _filename(resource: Resource) -> str:
    """Name a download after its run, so that tables of several runs can lie in one folder."""
    return "-".join(resource.names)
