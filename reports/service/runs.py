"""Where runs are below the root, and which files of a run are served: tables, plans and pages."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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


class Search(NamedTuple):
    """All that was found; `complete` is False if there are more folders than are searched."""

    found: list[Found]
    complete: bool


def find_runs(tree: Tree) -> Search:
    """Search for runs up to `MAX_DEPTH` folders below the root. Raises OSError if the root cannot be listed."""
    walk = _Walk(tree)
    return Search(list(walk.below((), tree.entries(()))), walk.left > 0)


class _Walk:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.left = MAX_FOLDERS

    def below(self, folder: Names, entries: Sequence[Entry]) -> Iterator[Found]:
        """Yield what the folders among the entries are."""
        for entry in entries:
            names = (*folder, entry.name)
            if entry.name.startswith(".") or entry.kind in (Kind.FILE, Kind.OTHER) or self.left <= 0:
                continue
            if entry.kind is Kind.LINK:
                yield Found(names, reason=f"it is a {Kind.LINK}, which is not followed")
            elif not is_addressable(entry.name):
                yield Found(names, reason="its name has characters that an address cannot have; rename it")
            else:
                yield from self._folder(names)

    def _folder(self, names: Names) -> Iterator[Found]:
        self.left -= 1
        try:
            entries = self._tree.entries(names)
        except Missing:  # removed since the folder above was read
            return
        except OSError as error:
            yield Found(names, reason=f"it cannot be listed: {why(error)}")
            return
        kind = next((entry.kind for entry in entries if entry.name == MANIFEST_NAME), None)
        if kind is not None:
            reason = None if kind is Kind.FILE else f"its {MANIFEST_NAME} is a {kind}, which is not read"
            yield Found(names, entries, reason)
            return
        inner = list(self.below(names, entries)) if len(names) < MAX_DEPTH else []
        if any(found.entries for found in inner):
            yield from inner
        else:
            yield Found(names, reason=f"it is not a run: it has no {MANIFEST_NAME}")


class RunPath(NamedTuple):
    """A path below the root, split into a run and what is requested of it."""

    run: Names
    rest: Names


def split(tree: Tree, names: Names) -> RunPath:
    """Find the run in a path: the first of its folders that has a manifest. Raises Missing or OSError."""
    for depth in range(1, min(MAX_DEPTH, len(names)) + 1):
        try:
            tree.open((*names[:depth], MANIFEST_NAME)).close()
        except Missing:
            continue
        return RunPath(names[:depth], names[depth:])
    raise Missing


class Listing(NamedTuple):
    """The entries of a run's folder, and of those of its folders from which files are served."""

    run: Names
    entries: Sequence[Entry]
    inner: Mapping[str, Sequence[Entry]]

    @property
    def version(self) -> str:
        """A digest that changes with the content of the run, as far as the store can tell."""
        return hashlib.sha256(repr((self.entries, self.inner)).encode(errors="replace")).hexdigest()

    @property
    def modified(self) -> float | None:
        """The time of the latest file; None if the store does not know it."""
        entries = [*self.entries, *(entry for inner in self.inner.values() for entry in inner)]
        return max((entry.modified for entry in entries if entry.modified is not None), default=None)


def listing_of(tree: Tree, run: Names, entries: Sequence[Entry]) -> Listing:
    """List the folders of a run. Raises OSError."""
    folders = [entry.name for entry in entries if entry.kind is Kind.FOLDER and entry.name in _FOLDERS]
    return Listing(run, entries, {name: _within(tree, (*run, name)) for name in folders})


def _within(tree: Tree, folder: Names) -> Sequence[Entry]:
    try:
        return [entry for entry in tree.entries(folder) if is_addressable(entry.name)]
    except Missing:
        return ()


class TableFile(NamedTuple):
    """One file of a table, with `part` if the table has several; `reason` says why it is not served."""

    table: str
    part: str | None
    names: Names
    size: int
    rows: int | None
    reason: str | None

    @property
    def problem(self) -> str | None:
        """The reason as a sentence."""
        return None if self.reason is None else f"{shown(self.names)} {self.reason}"

    def as_json(self) -> dict[str, str | int | None]:
        """Return the file as a JSON object; its path is relative to the run's page."""
        path = f"{self.table}{_PARQUET}" if self.part is None else f"{self.table}/{self.part}"
        shape = {"table": self.table, "part": self.part, "path": f"tables/{path}"}
        return {**shape, "bytes": self.size, "rows": self.rows, "problem": self.problem}


class PlanFile(NamedTuple):
    """A plan by the name of its file without ending; `problem` says why it is not served."""

    name: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of one run. `pages` are the names of those that exist, `skipped` says which entries are not served."""

    run: Names
    tables: Sequence[TableFile]
    plans: Sequence[PlanFile]
    pages: Sequence[str]
    skipped: Sequence[str]

    def rows(self, table: str) -> int | None:
        """Return how many rows all files of a table have; None without any, or if one of them cannot be used."""
        counts = [item.rows for item in self.tables if item.table == table]
        return sum(count or 0 for count in counts) if counts and None not in counts else None

    def parts(self, table: str) -> list[TableFile]:
        """Return the files of a table that has a folder of its own."""
        return [item for item in self.tables if item.table == table and item.part is not None]


def contents_of(files: Files, listing: Listing) -> Contents:
    """Check the tables and plans of a run."""
    run = listing.run
    whole = ((entry.name.removesuffix(_PARQUET), entry) for entry in listing.entries if entry.name.endswith(_PARQUET))
    tables = [_table(files, run, entry, table, None) for table, entry in whole if table in SCHEMAS]
    for table in sorted(listing.inner.keys() & SCHEMAS.keys()):
        parts = (entry for entry in listing.inner[table] if entry.name.endswith(_PARQUET))
        tables += [_table(files, (*run, table), entry, table, entry.name) for entry in parts]
    plans = (entry for entry in listing.inner.get(PLANS, ()) if entry.name.endswith(_JSON))
    special = [entry for entry in listing.entries if entry.kind in (Kind.LINK, Kind.OTHER)]
    return Contents(
        run=run,
        tables=tables,
        plans=[_plan(files, (*run, PLANS), entry) for entry in plans],
        pages=[entry.name for entry in listing.entries if entry.kind is Kind.FILE and entry.name in PAGES],
        skipped=[
            f"{shown((*run, entry.name))} {_not_followed(entry)}"
            for entry in special
            if entry.name in (*PAGES, *_FOLDERS)
        ],
    )


def _not_followed(entry: Entry) -> str:
    return f"is a {entry.kind}, which is not followed"


def _table(files: Files, folder: Names, entry: Entry, table: str, part: str | None) -> TableFile:
    names = (*folder, entry.name)
    if entry.kind is not Kind.FILE:
        return TableFile(table, part, names, 0, None, _not_followed(entry))
    footer = files.footer(names, table, version=entry.version, modified=entry.modified)
    return TableFile(table, part, names, entry.size, footer.rows, footer.reason)


def _plan(files: Files, folder: Names, entry: Entry) -> PlanFile:
    names, name = (*folder, entry.name), entry.name.removesuffix(_JSON)
    if entry.kind is not Kind.FILE:
        return PlanFile(name, f"{shown(names)} {_not_followed(entry)}")
    try:
        files.plan(names)
    except Missing:
        return PlanFile(name, f"{shown(names)} was removed")
    except ShortVError as error:
        return PlanFile(name, str(error))
    return PlanFile(name, None)


class Resource(NamedTuple):
    """A file of a run that a path names."""

    kind: str
    names: Names
    table: str = ""


def resource_of(run: Names, rest: Names) -> Resource | None:
    """Return the manifest, table or plan that a path below a run names, None for any other path.

    The page links to tables where they are in the folder, so `samples.parquet` is `tables/samples.parquet`.
    """
    if rest == (MANIFEST_NAME,):
        return Resource("manifest", (*run, MANIFEST_NAME))
    if len(rest) == 2 and rest[0] == PLANS and rest[1].endswith(_JSON):
        return Resource("plan", (*run, *rest))
    place = rest[1:] if rest[:1] == ("tables",) else rest
    if not 1 <= len(place) <= 2 or not place[-1].endswith(_PARQUET):
        return None
    table = place[0].removesuffix(_PARQUET) if len(place) == 1 else place[0]
    return Resource("table", (*run, *place), table) if table in SCHEMAS else None
