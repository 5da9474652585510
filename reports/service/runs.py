"""Where runs are below the root, and which files of a run are served: tables, plans and pages."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from reports.manifest import MANIFEST_NAME
from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.files import Files, shown, why
from reports.service.tree import Entry, Kind, Missing, Names, Tree, is_addressable
from shortv.errors import ShortVError

MAX_DEPTH: Final = 3
"""How many folders a path from the root to a run has at most, the run's own included."""
MAX_FOLDERS: Final = 5_000
"""How many folders are searched."""
PLANS: Final = "plans"
PARTS: Final = "parts"
AGAINST_NAME: Final = "report-against.html"
PAGES: Final = (PAGE_NAME, AGAINST_NAME)
_PARQUET: Final = ".parquet"
_JSON: Final = ".json"
_FOLDERS: Final = {*SCHEMAS, PLANS, PARTS}


class Found(NamedTuple):
    """A folder: a run with its entries, or the reason why it is not one."""

    names: Names
    entries: Sequence[Entry] = ()
    reason: str | None = None


class Search:
    """What is up to `MAX_DEPTH` folders below the root. Raises OSError if the root cannot be listed."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._left = MAX_FOLDERS
        self.found = self._below((), tree.entries(()))
        self.complete = self._left > 0
        """False if there are more folders than are searched."""

    def _below(self, folder: Names, entries: Sequence[Entry]) -> list[Found]:
        return [found for entry in entries for found in self._at((*folder, entry.name), entry.kind)]

    def _at(self, names: Names, kind: Kind) -> Sequence[Found]:
        if names[-1].startswith(".") or kind in (Kind.FILE, Kind.OTHER) or self._left <= 0:
            return []
        if kind is Kind.LINK:
            return [Found(names, reason=f"it {not_followed(kind)}")]
        if not is_addressable(names[-1]):
            return [Found(names, reason="its name has characters that an address cannot have; rename it")]
        self._left -= 1
        try:
            entries = self._tree.entries(names)
        except Missing:  # removed since the folder above was read
            return []
        except OSError as error:
            return [Found(names, reason=f"it cannot be listed: {why(error)}")]
        manifest = next((entry.kind for entry in entries if entry.name == MANIFEST_NAME), None)
        if manifest is not None:
            reason = None if manifest is Kind.FILE else f"its {MANIFEST_NAME} {not_followed(manifest)}"
            return [Found(names, entries, reason)]
        inner = self._below(names, entries) if len(names) < MAX_DEPTH else []
        if any(found.entries for found in inner):
            return inner
        return [Found(names, reason=f"it is not a run: it has no {MANIFEST_NAME}")]


def not_followed(kind: Kind) -> str:
    """Return why an entry is not served."""
    return f"is a {kind}, which is not followed"


class RunPath(NamedTuple):
    """A path below the root, split into a run and what is requested of it."""

    run: Names
    rest: Names


def split(tree: Tree, names: Names) -> RunPath:
    """Find the run in a path: the first of its folders that has a manifest. Raises Missing or OSError."""
    for depth in range(1, min(MAX_DEPTH, len(names)) + 1):
        try:
            tree.open((*names[:depth], MANIFEST_NAME)).stream.close()
        except Missing:
            continue
        return RunPath(names[:depth], names[depth:])
    raise Missing


class Listing(NamedTuple):
    """What a run's folder has, and those of its folders from which files are served, by path below the run.

    `version` is a digest that changes with the content of the run, as far as the store can tell; `modified` is the time
    of the latest file, None if the store does not know it.
    """

    run: Names
    entries: Mapping[Names, Entry]
    version: str
    modified: float | None


def listing_of(tree: Tree, run: Names, entries: Sequence[Entry]) -> Listing:
    """List the folders of a run. Raises OSError."""
    found: dict[Names, Entry] = {(entry.name,): entry for entry in entries}
    for folder in entries:
        if folder.kind is Kind.FOLDER and folder.name in _FOLDERS:
            with suppress(Missing):
                inner = tree.entries((*run, folder.name))
                found |= {(folder.name, entry.name): entry for entry in inner if is_addressable(entry.name)}
    version = hashlib.sha256(repr(found).encode(errors="replace")).hexdigest()
    times = [entry.modified for entry in found.values() if entry.modified is not None]
    return Listing(run, found, version, max(times, default=None))


class ResultFile(NamedTuple):
    """A file that is served: a manifest, a plan, or a table, with `part` if the table has several files.

    `size` and `rows`, or the reason why the file is not served, are known once it was checked.
    """

    kind: str
    names: Names
    table: str = ""
    part: str | None = None
    size: int = 0
    rows: int | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.names[-1].rpartition(".")[0]

    @property
    def problem(self) -> str | None:
        """The reason as a sentence."""
        return None if self.reason is None else f"{shown(self.names)} {self.reason}"

    def as_json(self) -> dict[str, str | int | None]:
        """Return a table as a JSON object; its path is relative to the run's page."""
        path = f"{self.table}{_PARQUET}" if self.part is None else f"{self.table}/{self.part}"
        shape = {"table": self.table, "part": self.part, "path": f"tables/{path}"}
        return {**shape, "bytes": self.size, "rows": self.rows, "problem": self.problem}

    def checked(self, files: Files, entry: Entry) -> "ResultFile":
        """Return the file as it is found now."""
        rows, reason = None, None
        if entry.kind is not Kind.FILE:
            reason = not_followed(entry.kind)
        elif self.kind == "table":
            rows, reason = files.footer(self.names, self.table, entry)
        elif self.kind == "plan":
            try:
                files.plan(self.names)
            except Missing:
                reason = "was removed"
            except ShortVError as error:
                reason = str(error).removeprefix(shown(self.names)).strip()
        return self._replace(size=entry.size, rows=rows, reason=reason)


def file_of(run: Names, rest: Names) -> ResultFile:
    """Return the manifest, table or plan that a path below a run names. Raises Missing for any other path.

    The page links to tables where they are in the folder, so `samples.parquet` is `tables/samples.parquet`.
    """
    if rest == (MANIFEST_NAME,):
        return ResultFile("manifest", (*run, *rest))
    if len(rest) == 2 and rest[0] == PLANS and rest[1].endswith(_JSON):
        return ResultFile("plan", (*run, *rest))
    place = rest[1:] if rest[:1] == ("tables",) else rest
    if 1 <= len(place) <= 2 and place[-1].endswith(_PARQUET):
        table = place[0].removesuffix(_PARQUET) if len(place) == 1 else place[0]
        if table in SCHEMAS:
            return ResultFile("table", (*run, *place), table, place[1] if len(place) == 2 else None)
    raise Missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of one run. `pages` are the names of those that exist, `skipped` says which entries are not served."""

    run: Names
    tables: Sequence[ResultFile]
    plans: Sequence[ResultFile]
    pages: Sequence[str]
    skipped: Sequence[str]

    def rows(self, table: str) -> int | None:
        """Return how many rows all files of a table have; None without any, or if one of them cannot be used."""
        counts = [file.rows for file in self.tables if file.table == table]
        return sum(count or 0 for count in counts) if counts and None not in counts else None

    def parts(self, table: str) -> list[ResultFile]:
        """Return the files of a table that has a folder of its own."""
        return [file for file in self.tables if file.table == table and file.part is not None]

    def problems(self) -> list[str]:
        """Name what is not served and why; the files of one table with the same reason together."""
        groups: dict[tuple[str, str], list[ResultFile]] = {}
        for file in (*self.tables, *self.plans):
            if file.reason is not None:
                groups.setdefault((file.table or file.name, file.reason), []).append(file)
        return [*self.skipped] + [
            f"{len(files)} files of {table}: each {reason}" if len(files) > 1 else str(files[0].problem)
            for (table, reason), files in groups.items()
        ]


def contents_of(files: Files, listing: Listing) -> Contents:
    """Check the tables and plans of a run."""
    run = listing.run
    found = []
    for rest, entry in listing.entries.items():
        with suppress(Missing):
            found.append(file_of(run, rest).checked(files, entry))
    top = [entry for rest, entry in listing.entries.items() if len(rest) == 1]
    return Contents(
        run=run,
        tables=[file for file in found if file.kind == "table"],
        plans=[file for file in found if file.kind == "plan"],
        pages=[entry.name for entry in top if entry.kind is Kind.FILE and entry.name in PAGES],
        skipped=[
            f"{shown((*run, entry.name))} {not_followed(entry.kind)}"
            for entry in top
            if entry.kind in (Kind.LINK, Kind.OTHER) and entry.name in (*PAGES, *_FOLDERS)
        ],
    )
