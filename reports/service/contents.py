"""What a run folder holds that the service hands out: tables, plans and pages."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.files import Files, shown
from reports.service.trees import Entry, Kind, Missing, Names, Tree, is_addressable
from shortv.errors import ShortVError

_PARQUET: Final = ".parquet"
_JSON: Final = ".json"
PLANS: Final = "plans"
PARTS: Final = "parts"
AGAINST_NAME: Final = "report-against.html"
PAGES: Final = (PAGE_NAME, AGAINST_NAME)
_FOLDERS: Final = {*SCHEMAS, PLANS, PARTS}
_NOT_FOLLOWED: Final = "is a {}, which is not followed"


class Listing(NamedTuple):
    """What stands in a run's folder, and in those of its folders that the service hands files out of."""

    run: Names
    entries: Sequence[Entry]
    inner: Mapping[str, Sequence[Entry]]

    @property
    def version(self) -> str:
        """Changes with the content of the run, as far as the store can tell."""
        return hashlib.sha256(repr((self.entries, self.inner)).encode(errors="replace")).hexdigest()

    @property
    def modified(self) -> float | None:
        """The time of the latest file; None where the store does not tell."""
        entries = [*self.entries, *(entry for inner in self.inner.values() for entry in inner)]
        return max((entry.modified for entry in entries if entry.modified is not None), default=None)


class TableFile(NamedTuple):
    """One file of a table, with `part` where the table has several; `reason` says why it is not handed out."""

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

    @property
    def path(self) -> str:
        """Where the file is among the tables of its run."""
        return f"{self.table}{_PARQUET}" if self.part is None else f"{self.table}/{self.part}"

    def as_json(self) -> dict[str, str | int | None]:
        """Return the file as a JSON object; its path is relative to the run's page."""
        shape = {"table": self.table, "part": self.part, "path": f"tables/{self.path}"}
        return {**shape, "bytes": self.size, "rows": self.rows, "problem": self.problem}


class PlanFile(NamedTuple):
    """A plan by its name without ending; `problem` says why it is not handed out."""

    name: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of one run; `pages` are the names of those that are there."""

    run: Names
    tables: Sequence[TableFile]
    plans: Sequence[PlanFile]
    pages: Sequence[str]

    def rows(self, table: str) -> int | None:
        """Return how many rows all files of a table hold; None without any, or where one of them cannot be used."""
        counts = [item.rows for item in self.tables if item.table == table]
        return sum(count or 0 for count in counts) if counts and None not in counts else None

    def parts(self, table: str) -> list[TableFile]:
        """Return the files of a table in a folder of its own."""
        return [item for item in self.tables if item.table == table and item.part is not None]


def listing_of(tree: Tree, run: Names, entries: Sequence[Entry]) -> Listing:
    """List the folders of a run. Raises OSError."""
    folders = [entry.name for entry in entries if entry.kind is Kind.FOLDER and entry.name in _FOLDERS]
    return Listing(run, entries, {name: _within(tree, (*run, name)) for name in folders})


def contents_of(files: Files, listing: Listing) -> Contents:
    """Check the tables and plans of a run."""
    tables = [*_single(files, listing)]
    for table in sorted(listing.inner.keys() & SCHEMAS.keys()):
        parts = (entry for entry in listing.inner[table] if entry.name.endswith(_PARQUET))
        tables += [_checked(files, (*listing.run, table), entry, table, entry.name) for entry in parts]
    plans = (entry for entry in listing.inner.get(PLANS, ()) if entry.name.endswith(_JSON))
    there = {entry.name for entry in listing.entries if entry.kind is Kind.FILE}
    return Contents(
        run=listing.run,
        tables=tables,
        plans=[_plan(files, (*listing.run, PLANS), entry) for entry in plans],
        pages=[name for name in PAGES if name in there],
    )


def _single(files: Files, listing: Listing) -> Iterator[TableFile]:
    for entry in listing.entries:
        table = entry.name.removesuffix(_PARQUET)
        if table != entry.name and table in SCHEMAS:
            yield _checked(files, listing.run, entry, table, None)


def _within(tree: Tree, folder: Names) -> Sequence[Entry]:
    try:
        return [entry for entry in tree.entries(folder) if is_addressable(entry.name)]
    except Missing:
        return ()


def _checked(files: Files, folder: Names, entry: Entry, table: str, part: str | None) -> TableFile:
    names = (*folder, entry.name)
    if entry.kind is not Kind.FILE:
        return TableFile(table, part, names, 0, None, _NOT_FOLLOWED.format(entry.kind))
    footer = files.footer_at(names, entry.version, entry.modified, table)
    return TableFile(table, part, names, entry.size, footer.rows, footer.reason)


def _plan(files: Files, folder: Names, entry: Entry) -> PlanFile:
    names, name = (*folder, entry.name), entry.name.removesuffix(_JSON)
    if entry.kind is not Kind.FILE:
        return PlanFile(name, f"{shown(names)} {_NOT_FOLLOWED.format(entry.kind)}")
    try:
        files.plan(names)
    except Missing:
        return PlanFile(name, f"{shown(names)} is not there any more")
    except ShortVError as error:
        return PlanFile(name, str(error))
    return PlanFile(name, None)


class Resource(NamedTuple):
    """A file to hand out, by what was asked of a run."""

    kind: str
    names: Names
    table: str = ""


def resource_of(run: Names, rest: Names) -> Resource | None:
    """Return the table or plan that a path below a run names, None for anything else.

    The page links to tables where they lie in the folder, so `samples.parquet` is `tables/samples.parquet`.
    """
    if len(rest) == 2 and rest[0] == PLANS and rest[1].endswith(_JSON):
        return Resource("plan", (*run, *rest))
    place = rest[1:] if rest[:1] == ("tables",) else rest
    if not 1 <= len(place) <= 2 or not place[-1].endswith(_PARQUET):
        return None
    table = place[0].removesuffix(_PARQUET) if len(place) == 1 else place[0]
    return Resource("table", (*run, *place), table) if table in SCHEMAS else None
