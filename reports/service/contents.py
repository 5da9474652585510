"""What a run folder holds that the service hands out: tables, plans and the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.files import Files, shown
from reports.service.trees import Entry, Kind, Missing, Names, is_addressable

_PARQUET: Final = ".parquet"
_JSON: Final = ".json"
PLANS: Final = "plans"


class TableFile(NamedTuple):
    """One file of a table, with `part` where the table has several; `problem` says why it is not handed out."""

    table: str
    part: str | None
    names: Names
    size: int
    rows: int | None
    problem: str | None

    @property
    def path(self) -> str:
        """Where the file is among the tables of its run."""
        return f"{self.table}{_PARQUET}" if self.part is None else f"{self.table}/{self.part}"

    def as_json(self) -> dict[str, str | int | None]:
        """Return the file as a JSON object; its path is relative to the run's page."""
        shape = {"table": self.table, "part": self.part, "path": f"tables/{self.path}"}
        return {**shape, "bytes": self.size, "rows": self.rows, "problem": self.problem}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of one run; `plans` are their names without ending."""

    run: Names
    tables: Sequence[TableFile]
    plans: Sequence[str]
    has_page: bool


def contents_of(files: Files, run: Names, entries: Sequence[Entry]) -> Contents:
    """List a run's files and check its tables. Raises OSError when a folder cannot be listed."""
    folders = {entry.name for entry in entries if entry.kind is Kind.FOLDER}
    tables = [*_single(files, run, entries)]
    for table in sorted(folders & SCHEMAS.keys()):
        tables += parts_of(files, run, table)
    return Contents(
        run=run,
        tables=tables,
        plans=list(_plans(files, run)) if PLANS in folders else (),
        has_page=any(entry.name == PAGE_NAME and entry.kind is Kind.FILE for entry in entries),
    )


def parts_of(files: Files, run: Names, table: str) -> list[TableFile]:
    """List the files of a table in a folder of its own. Raises OSError."""
    return [_checked(files, (*run, table), entry, table, entry.name) for entry in _within(files, (*run, table))]


def _single(files: Files, run: Names, entries: Sequence[Entry]) -> Iterator[TableFile]:
    for entry in entries:
        table = entry.name.removesuffix(_PARQUET)
        if table != entry.name and table in SCHEMAS:
            yield _checked(files, run, entry, table, None)


def _within(files: Files, folder: Names) -> Iterator[Entry]:
    try:
        entries = files.tree.entries(folder)
    except Missing:
        return
    yield from (entry for entry in entries if entry.name.endswith(_PARQUET) and is_addressable(entry.name))


def _checked(files: Files, folder: Names, entry: Entry, table: str, part: str | None) -> TableFile:
    names = (*folder, entry.name)
    if entry.kind is not Kind.FILE:
        problem = f"{shown(names)} is a {entry.kind}, which is not followed"
        return TableFile(table, part, names, 0, None, problem)
    footer = files.footer_at(names, entry.version, entry.modified, table)
    return TableFile(table, part, names, entry.size, footer.rows, footer.problem)


def _plans(files: Files, run: Names) -> Iterator[str]:
    try:
        entries = files.tree.entries((*run, PLANS))
    except Missing:
        return
    for entry in entries:
        if entry.name.endswith(_JSON) and is_addressable(entry.name):
            yield entry.name.removesuffix(_JSON)


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
