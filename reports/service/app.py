"""The routes of the download service: the list of runs, and below each run its page, manifest, tables and plans."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from markupsafe import Markup, escape
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router

from reports.access import address_of, bound, check_host, key_digests_of
from reports.http import HttpError, accepts_html, guarded, info_of, log_requests, serve_app
from reports.locations import masked_uri
from reports.manifest import MANIFEST_NAME, State, TrainingManifest
from reports.page import PAGE_NAME
from reports.page.document import page_style, policy_digest, template_environment
from reports.schemas import SCHEMAS
from reports.service.downloads import file_response, names_tag
from reports.service.files import Files, shown, why
from reports.service.runs import PAGES, Found, ResultFile, Search, file_of, split
from reports.service.summary import AnyManifest, Summaries, Summary, label_of, link_of, read_run
from reports.service.tree import Missing, Names, OpenFile, checked, open_tree
from shortv.errors import Refused, ShortVError
from shortv.terminal import printable

PARQUET: Final = "application/vnd.apache.parquet"
# Listing a store is mostly waiting.
_THREADS: Final = 8
# Each holds a chunk of a file and a descriptor; more are refused.
_MAX_CONNECTIONS: Final = 256
_MAX_JOINED: Final = 12
_PORT: Final = 8080
_MAX_SHOWN: Final = 500
_METHODS: Final = ("GET", "HEAD")
_NO_CACHE: Final = {"cache-control": "private, no-cache"}
_LIST_POLICY: Final = (
    "default-src 'none'; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Anybody with access to the folder may have written the page: it gets no part in this origin.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)
_NOT_FOUND: Final = "nothing is served under this name; GET /runs lists what is"


def run_service(
    root: str, *, host: str | None, port: int | None, api_key_file: str | None, say: Callable[[str], None]
) -> int:
    """Serve the runs below a root until SIGTERM or Ctrl-C; return the exit status.

    Raises:
        Refused: the root, key file or host is not usable, or the address cannot be bound.
    """
    host = check_host(host, with_key=api_key_file is not None)
    digests = key_digests_of(api_key_file) if api_key_file else ()
    app = guarded([Mount("/", make_service(root))], key_digests=digests)
    with bound(host, _PORT if port is None else port) as listening:
        ready = f"{masked_uri(root)} is at {address_of(listening)}/; Ctrl-C stops it"
        log_requests()
        serve_app(app, listening, announce=partial(say, ready), max_connections=_MAX_CONNECTIONS)
    say("stopped")
    return 0


def make_service(root: str) -> Router:
    """Build the service over a local folder or an object-store URI; it must be behind `reports.http.Guard`.

    Routes: `/` and `/runs` (a page, JSON with `Accept: application/json`), `/runs.json`, and below `/runs/ID/` the
    page, `report-against.html`, `manifest.json`, `tables`, `tables/TABLE.parquet`, `tables/TABLE`,
    `tables/TABLE/PART.parquet` and `plans/NAME.json`. Symbolic links below the root are not followed.

    Raises:
        Refused: the root is not a folder, or is a run itself.
    """
    tree = open_tree(root)
    try:
        inside = {entry.name for entry in tree.entries(())}
    except OSError as error:
        raise Refused(f"the folder of runs cannot be listed: {why(error)}; choose another") from error
    if MANIFEST_NAME in inside:
        raise Refused("the folder to serve is a run itself; give the folder above it")
    service = _Service(Files(tree))
    routes = {"/": service.list, "/runs": service.list, "/runs.json": service.list_json}
    routes["/runs/{path:path}"] = service.run
    return Router([Route(path, respond, methods=_METHODS) for path, respond in routes.items()], redirect_slashes=False)


class _Service:
    """The list of runs, as a page and as JSON, and what is served below one run."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._summaries = Summaries(files)

    async def list(self, request: Request) -> Response:
        """Return a page, or JSON if the request accepts JSON and no page."""
        if "application/json" in request.headers.get("accept", "") and not accepts_html(request.scope):
            return await self.list_json(request)
        info_of(request.scope).subject = "kind=list"
        page = await run_in_threadpool(lambda: list_page(*self._found()))
        policy = _LIST_POLICY.format(style=policy_digest(page_style()))
        headers = {"content-security-policy": policy, "vary": "Accept", **_NO_CACHE}
        return Response(page, headers=headers, media_type="text/html")

    async def list_json(self, request: Request) -> Response:
        """Return JSON; links are relative to the root of the service."""
        info_of(request.scope).subject = "kind=list"
        runs, complete = await run_in_threadpool(self._found)
        return _json({"runs": [run.shape for run in runs], "complete": complete})

    def _found(self) -> tuple[Sequence[Summary], bool]:
        try:
            search = Search(self._files.tree)
        except OSError as error:
            raise HttpError(503, f"the folder of runs cannot be listed: {why(error)}", code="unavailable") from error
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="shortv-runs") as threads:
            return list(threads.map(self._summaries.of, search.found)), search.complete

    async def run(self, request: Request) -> Response:
        """Respond to one path below /runs/."""
        path: str = request.path_params["path"]
        try:
            names = checked(tuple(path.removesuffix("/").split("/")))
            run, rest = await run_in_threadpool(split, self._files.tree, names)
            manifest = await run_in_threadpool(read_run, self._files, run)
            if path.endswith("/") and rest:
                raise Missing
            if not rest and not path.endswith("/"):
                # The links of the page are relative to the folder.
                return Response(status_code=308, headers={"location": f"./{quote(run[-1], safe='')}/"})
            if not rest or (len(rest) == 1 and rest[0] in PAGES):
                return await self._page(request, run, manifest, rest[0] if rest else PAGE_NAME)
            if rest[0] == "tables" and (len(rest) == 1 or (len(rest) == 2 and rest[1] in SCHEMAS)):
                return await self._tables(request, run, rest[1:])
            return await self._file(request, run, rest, manifest.state)
        except Missing:
            raise HttpError(404, _NOT_FOUND, code="not_found") from None
        except ShortVError as error:
            raise HttpError(422, str(error), code="unreadable") from error
        except OSError as error:
            raise HttpError(503, f"the file could not be read: {why(error)}", code="unavailable") from error

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
            page = head + body + note.encode(errors="replace") + tail if body else note.encode(errors="replace") + page
        etag = f'"{hashlib.sha256(page).hexdigest()}"'
        headers = {"content-security-policy": _PAGE_POLICY, "etag": etag, **_NO_CACHE}
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
        files = [item.as_json() for item in found]
        return _json({"run": shown(run), "state": summary.shape["state"], "files": files})

    async def _file(self, request: Request, run: Names, rest: Names, state: State) -> Response:
        file = file_of(run, rest)
        info_of(request.scope).subject = f"kind={file.kind}"
        file, opened = await run_in_threadpool(self._open, run, file)
        media_type = PARQUET if file.kind == "table" else "application/json"
        try:
            # The name starts with the run's, so that tables of several runs can be saved in one folder.
            response = file_response(request, opened, media_type=media_type, filename="-".join(file.names))
        except BaseException:
            opened.stream.close()
            raise
        response.headers["x-run-state"] = state
        return response

    def _look(self, run: Names) -> Summary:
        return self._summaries.of(Found(run, self._files.tree.entries(run)))

    def _open(self, run: Names, file: ResultFile) -> tuple[ResultFile, OpenFile]:
        """Open a file, or the only part of its table. Raises Missing, OSError, or ShortVError with what is wrong."""
        try:
            opened = self._files.tree.open(file.names)
        except Missing:
            file = self._only_part(run, file)
            opened = self._files.tree.open(file.names)
        problem = file.checked(self._files, opened.entry).problem
        if problem is not None:
            opened.stream.close()
            raise ShortVError(problem)
        return file, opened

    def _only_part(self, run: Names, file: ResultFile) -> ResultFile:
        """Return the one file of a table that has a folder. Raises Missing, or HttpError for several files."""
        contents = self._look(run).contents
        parts = contents.parts(file.table) if contents and file.part is None else []
        if not parts:
            raise Missing
        if len(parts) > 1:
            problem = f"{file.table} has {len(parts)} parts; GET /runs/{shown(run)}/tables/{file.table} lists them"
            raise HttpError(404, problem, code="in_parts")
        return parts[0]


def _no_page(run: Names, manifest: AnyManifest, page_name: str) -> str:
    """Say why a run has no page, and what to do."""
    name = shown(run)
    if isinstance(manifest, TrainingManifest):
        return f"{name} is a training, which has no page; GET /runs/{name}/tables lists its files"
    found, other = ("page", "") if page_name == PAGE_NAME else ("comparison", " --against OTHER")
    return f"{name} has no {found} yet; make it with `python jobs/report.py FOLDER/{name}{other}`"


def list_page(runs: Sequence[Summary], complete: bool) -> bytes:
    """Return the list as a page; its links are relative to the root of the service."""
    environment = template_environment(Path(__file__).parent)
    environment.filters["short"] = lambda value: "unknown" if value is None else f"{value:.4g}"
    environment.filters["joined"] = _joined
    environment.finalize = lambda value: printable(value, limit=_MAX_SHOWN) if type(value) is str else value
    template = environment.get_template("list.html")
    text = template.render(runs=list(map(_listed, runs)), complete=complete, style=Markup(page_style()))
    return text.encode("utf-8", errors="replace")


def _listed(run: Summary) -> dict[str, Any]:
    manifest, contents = run.manifest, run.contents
    label = label_of(manifest) if manifest else None
    return {
        "shape": run.shape,
        "link": link_of(run.names),
        "warnings": [printable(line, limit=_MAX_SHOWN) for line in [*([label] if label else []), *run.problems]],
        "counted": "used" if manifest and manifest.kind == "sweep" else "samples",
        "plans": contents.plans if contents else [],
        # A page that does not exist says how to make it; a training never has one.
        "has_page": manifest is not None and not isinstance(manifest, TrainingManifest),
    }


def _joined(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_JOINED} more" if len(items) > _MAX_JOINED else ""
    return ", ".join(map(str, items[:_MAX_JOINED])) + more


def _json(value: Any) -> Response:
    headers = {"vary": "Accept", **_NO_CACHE}
    return Response(json.dumps(value, allow_nan=False) + "\n", headers=headers, media_type="application/json")
