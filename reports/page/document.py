"""What a page is made of, whatever run it shows, and the style and templates of every page."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# More rows would make the page slow; the Parquet file beside it has them all.
MOST_ROWS: Final = 500

Value = str | int | float | bool | None
Fact = tuple[str, Value]


class Command(NamedTuple):
    """A command line that repeats a run, and what to know before running it."""

    line: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; `total` is the number of rows if `rows` has only the first of them."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    total: int | None = None
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A Vega-Lite chart, its data by name, and the same numbers as a table.

    `description` is what a screen reader says. `canvas` draws pixels, for charts of thousands of marks.
    """

    key: str
    title: str
    note: str
    description: str
    spec: Mapping[str, Any]
    data: Mapping[str, Sequence[Mapping[str, Value]]]
    numbers: Grid
    canvas: bool = False
    half: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under one heading."""

    title: str
    text: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    charts: Sequence[Chart] = ()
    grids: Sequence[Grid] = ()
    command: Command | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole page. `warnings` stand at its top; `state` is that of the run (running, complete, partial)."""

    title: str
    kind: str
    state: str
    warnings: Sequence[str] = ()
    headline: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    links: str | None = field(default="")
    """Where the run's files are, seen from the page; None: they cannot be linked."""


def shortened(rows: Sequence[Sequence[Value]], **rest: Any) -> Grid:
    """Return a table of the first `MOST_ROWS` rows, which says how many there are."""
    return Grid(rows=rows[:MOST_ROWS], total=len(rows) if len(rows) > MOST_ROWS else None, **rest)


def template_environment(folder: Path) -> Environment:
    """Return Jinja's environment for the templates in a folder: every text is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_style() -> str:
    """Return the style sheet of all pages."""
    return (Path(__file__).parent / "page.css").read_text("utf-8")


def policy_digest(text: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
