"""From a page to one HTML file: template, style, script and charting library inlined, the network forbidden."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import vl_convert
from altair import SCHEMA_VERSION as VEGA_LITE
from markupsafe import Markup

from reports.page.document import Chart, Page, Value, page_style, policy_digest, template_environment

_HERE: Final = Path(__file__).parent
# Characters that end a script element or open a comment in it.
_IN_SCRIPT: Final = {
    ord("<"): "\\u003c",
    ord(">"): "\\u003e",
    ord("&"): "\\u0026",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def render(page: Page) -> bytes:
    """Return the page as one HTML file in UTF-8. Every text from a run is escaped."""
    scripts = (library(), _read("page.js"))
    style = page_style()
    charts = {chart.key: _embedded(chart) for section in page.sections for chart in section.charts}
    environment = template_environment(_HERE)
    environment.filters["number"] = number
    template = environment.get_template("page.html")
    text = template.render(
        page=page,
        policy=_policy(scripts, style),
        style=Markup(style),
        # Neither is text from a run, and both are checked by the policy's digests.
        scripts=[Markup(script) for script in scripts],
        charts=Markup(_json(charts)),
        href=_link(page.links),
    )
    return text.encode("utf-8", errors="replace")


@cache
def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script; made from the package, without a network."""
    version = ".".join(VEGA_LITE.removeprefix("v").split(".")[:2])
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
    spec = {**chart.spec, "datasets": {name: _columns(rows) for name, rows in chart.data.items()}}
    return {"spec": spec, "renderer": "canvas" if chart.canvas else "svg"}


def _columns(rows: Sequence[Mapping[str, Value]]) -> dict[str, Any]:
    """Column-wise, which takes half of the space; the page's script makes rows of it."""
    names = list(rows[0]) if rows else []
    return {name: [_json_value(row[name]) for row in rows] for name in names}


def _json_value(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)


def _policy(scripts: Sequence[str], style: str) -> str:
    digests = " ".join(policy_digest(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {digests}; style-src {policy_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _link(links: str | None) -> Any:
    return lambda file: None if links is None else links + quote(file)


def _read(name: str) -> str:
    return (_HERE / name).read_text("utf-8")
