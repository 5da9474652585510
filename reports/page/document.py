"""What a page is made of, whatever run it shows, and how it becomes one HTML file that loads nothing."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_HERE: Final = Path(__file__).parent
# More rows would make the page slow; the Parquet file beside it has them all.
MOST_ROWS: Final = 500
_MOST_CHARACTERS: Final = 300
# Characters that end a script element or open a comment in it.
_IN_SCRIPT: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# What columns are called on the page where their names do not say it.
_LABELS: Final = {
    **dict.fromkeys(("ci_low", "low"), "95 % from"),
    **dict.fromkeys(("ci_high", "high", "rank_high"), "to"),
    **{"n": "samples", "n_text": "text tokens", "n_visual": "visual tokens", "dataset": "data set"},
    **{"mean": "LC (nats)", "rank_low": "rank from", "flops_ratio": "FLOPs ratio", "sample_id": "sample"},
    **{"p_value": "p", "p_holm": "p (Holm)", "q_bh": "q (Benjamini-Hochberg)"},
    **{"samples_per_second": "samples/s", "share_changed": "answers changed", "config_digest": "architecture digest"},
    **{"train_seconds": "training seconds", "num_docs": "documents", "layer_left": "exit after layer"},
    **{"count_all": "samples", "prefill_ratio": "prefill time ratio", "batch_prefill_ms": "prefill ms"},
    **{"step_ms": "decoding step ms", "ttft_ms": "first token ms", "kv_bytes": "KV cache kB", "peak_bytes": "peak GB"},
    **{f"{name}_ms_median": f"{name} ms" for name in ("preprocess", "vision", "latency")},
}

Value = str | int | float | bool | None
Row = Mapping[str, Any]
Fact = tuple[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; `total` is the number of rows if `rows` has only the first of them."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: int | None = None
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """An Altair chart, its data by name, and the same numbers as a table.

    `description` is what a screen reader says. `canvas` draws pixels, for charts of thousands of marks.
    """

    key: str
    title: str
    note: str
    description: str
    marks: Any
    height: int
    data: Mapping[str, Sequence[Row]]
    numbers: Grid
    canvas: bool = False
    half: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """Questions that the page's script shows, and filters by `names`: distinct models, tasks, plans and kinds.

    A card is a question of a model's task with the full model's answer and, as `rows`, those of the plans that changed
    it; its `image` is the place of a JPEG file in `images`, in base64. `shown` rows are in cards, of `total`.
    """

    names: Mapping[str, Sequence[str]]
    cards: Sequence[Row]
    images: Sequence[str]
    shown: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under one heading; a command line that repeats a run has a note to read before."""

    title: str
    text: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    charts: Sequence[Chart] = ()
    grids: Sequence[Grid] = ()
    command: str = ""
    note: str = ""
    cards: Cards | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole page. `warnings` stand at its top; `state` is that of the run (running, complete, partial).

    `links` is where the run's files are, seen from the page; None if they cannot be linked.
    """

    title: str
    state: str
    warnings: Sequence[str]
    headline: Sequence[Fact]
    sections: Sequence[Section]
    links: str | None = ""


def label_of(column: str) -> str:
    """Return what a column of a result table is called on the page."""
    return _LABELS.get(column) or column.replace("_", " ")


def grid(
    caption: str,
    rows: Sequence[Row] | pa.Table,
    columns: str,
    *,
    files: Sequence[str] = (),
    most: int | None = None,
    **labels: str,
) -> Grid:
    """Return a table of some columns of the rows: their names in order, with spaces between.

    `labels` replace what columns are usually called. Only the first `most` rows are taken; long texts are cut.
    """
    names = columns.split()
    first = rows[:most].to_pylist() if isinstance(rows, pa.Table) else rows[:most]
    return Grid(
        caption=caption,
        columns=[labels.get(name) or label_of(name) for name in names],
        rows=[[cut(row.get(name)) for name in names] for row in first],
        total=len(rows) if len(rows) > len(first) else None,
        files=files,
    )


def cut(value: Value) -> Value:
    """Return the value; of a long text its beginning."""
    is_long = isinstance(value, str) and len(value) > _MOST_CHARACTERS
    return f"{str(value)[: _MOST_CHARACTERS - 1]}…" if is_long else value


def render(page: Page) -> bytes:
    """Return the page as one HTML file in UTF-8. Every text from a run is escaped."""
    cards = next((section.cards for section in page.sections if section.cards), None)
    own = ("page.js", "cards.js") if cards else ("page.js",)
    scripts = (library(), *((_HERE / name).read_text("utf-8") for name in own))
    digests = " ".join(map(policy_digest, scripts))
    charts = {chart.key: _embedded(chart) for section in page.sections for chart in section.charts}
    environment = template_environment(_HERE)
    environment.filters["number"] = number
    text = environment.get_template("page.html").render(
        page=page,
        policy=f"default-src 'none'; script-src {digests}; style-src {policy_digest(page_style())}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(page_style()),
        # Neither is text from a run, and both are checked by the policy's digests.
        scripts=[Markup(script) for script in scripts],
        charts=_in_script(charts),
        cards=_in_script({"cards": cards.cards, "images": cards.images}) if cards else None,
        href=lambda file: None if page.links is None else page.links + quote(file),
    )
    return text.encode("utf-8", errors="replace")


def _in_script(value: Any) -> Markup:
    """Return a value as JSON that may stand in a script element."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT))


@cache
def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script; made from the package, without a network."""
    import vl_convert
    from altair import SCHEMA_VERSION

    version = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return script.replace("</script", "<\\/script")


def number(value: Value) -> str:
    """Return a table's cell as text: numbers to four digits, nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not a number"
    return str(value)


def _embedded(chart: Chart) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart as wide as its place, and how it is drawn."""
    size = {"width": "container", "height": chart.height, "autosize": {"type": "fit-x", "contains": "padding"}}
    # The page's script sets its own configuration for every colour scheme.
    spec = {name: value for name, value in chart.marks.to_dict().items() if name != "config"}
    datasets = {name: [_json_row(row) for row in rows] for name, rows in chart.data.items()}
    spec |= size | {"description": chart.description, "datasets": datasets}
    return {"spec": spec, "renderer": "canvas" if chart.canvas else "svg"}


def _json_row(row: Row) -> Row:
    """JSON has numbers that are finite only."""
    return {name: None if isinstance(it, float) and not math.isfinite(it) else it for name, it in row.items()}


def template_environment(folder: Path) -> Environment:
    """Return Jinja's environment for the templates in a folder: every text is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def page_style() -> str:
    """Return the style sheet of all pages."""
    return (_HERE / "page.css").read_text("utf-8")


def policy_digest(text: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
