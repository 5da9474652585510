"""What the charts share: colours and shapes, axes, tooltips, intervals, and names beside points."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import altair as alt

from reports.page.campaign_data import KINDS
from reports.page.document import label_of
from shortv.plan import Mode

_MODES: Final = [*(mode.value for mode in Mode if mode is not Mode.FULL), Mode.FULL.value]
# Vega's names, and paths in its box of -1 to 1: a saltire, a star and an hourglass.
_KIND_SHAPES: Final = [
    *("circle", "cross", "triangle-up", "triangle-down", "diamond", "square", "triangle-right", "triangle-left"),
    "M-.9-.5L-.5-.9L0-.4L.5-.9L.9-.5L.4 0L.9 .5L.5 .9L0 .4L-.5 .9L-.9 .5L-.4 0Z",
    "M0-1.1L.3-.4L1.05-.34L.48 .15L.65 .89L0 .5L-.65 .89L-.48 .15L-1.05-.34L-.3-.4Z",
    "M-.85-.9L.85-.9L.2 0L.85 .9L-.85 .9L-.2 0Z",
    "M-.9-.85L0-.2L.9-.85L.9 .85L0 .2L-.9 .85Z",
]
_MODE_SHAPES: Final = [
    *("circle", "square", "triangle-up", "triangle-down", "diamond", "cross", "triangle-right", "stroke")
]
# The values of a column that has colours and shapes, the range of its colours, and its shapes. The page's script gives
# the colours, by place in the list of values. Vega-Lite accepts no names of ranges but its own.
_SCALES: Final[Mapping[str, tuple[Sequence[str], str, Sequence[str]]]] = {
    "mode": (_MODES, "category", _MODE_SHAPES),
    "kind": (KINDS, "ordinal", _KIND_SHAPES),
}
# Further below the lowest value than this many decades, a noise floor would press the lines together.
_NEAR: Final = 3
# In pixels: the width of a letter in charts, of the axis left of most charts, and of the names of lines at most.
_LETTER: Final = 7
_AXIS: Final = 60
_NAMES: Final = 240


def data(name: str = "rows") -> alt.Chart:
    """Return a chart without marks over one of the data sets of a `Chart`."""
    return alt.Chart(alt.NamedData(name=name))


def colour_of(
    column: str, shown: Iterable[str], *, lines: Iterable[str] = (), symbols: Any = alt.Undefined
) -> alt.Color:
    """Return the colour of the column `mode` or `kind`, the same for a value in every chart.

    The legend, if any, lists the values `shown`, right of the chart's axis or of the names of its `lines`.
    """
    domain, colours, _ = _SCALES[column]
    left = min(_NAMES, _LETTER * max(map(len, lines))) if lines else _AXIS
    legend = _legend(domain, shown, left, symbols)
    return alt.Color(f"{column}:N", scale=alt.Scale(domain=domain, range=colours), legend=legend)


def shape_of(column: str, shown: Iterable[str]) -> alt.Shape:
    """Return the shape of points by the column `mode` or `kind`; its legend is one with that of the colour."""
    domain, _, shapes = _SCALES[column]
    legend = _legend(domain, shown, _AXIS, alt.Undefined)
    return alt.Shape(f"{column}:N", scale=alt.Scale(domain=domain, range=shapes), legend=legend)


def _legend(domain: Sequence[str], shown: Iterable[str], left: int, symbols: Any) -> alt.Legend | None:
    values = [value for value in domain if value in set(shown)]
    if not values:
        return None
    # How wide the chart is, only the browser knows.
    columns = alt.ExprRef(f"max(1, floor((containerSize()[0] - {left}) / {25 + _LETTER * max(map(len, values))}))")
    return alt.Legend(title=None, orient="top", values=values, columns=columns, symbolType=symbols, symbolOpacity=1)


def layer_axis() -> alt.X:
    """Return the axis of decoder layers, which are whole numbers."""
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    return alt.X("layer:Q", title="decoder layer", axis=axis, scale=alt.Scale(nice=False, padding=12))


def layer_bands(column: str = "layer", title: str = "decoder layer") -> alt.X:
    """Return the axis of decoder layers where each is a column of cells."""
    axis = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, ticks=False)
    return alt.X(f"{column}:O", title=title, axis=axis, sort=None)


def line_axis(column: str, width: int = _NAMES) -> alt.Y:
    """Return the axis of a chart with a line for each value of a column, whose names have at most `width` pixels."""
    axis = alt.Axis(labelLimit=width, ticks=False, domain=False)
    return alt.Y(f"{column}:N", sort=None, title=None, axis=axis)


def tips(texts: str, **numbers: str) -> list[alt.Tooltip]:
    """Return what a mark says: columns of texts, with spaces between, and columns of numbers with their formats."""
    said = [alt.Tooltip(f"{name}:N", title=label_of(name)) for name in texts.split()]
    return said + [alt.Tooltip(f"{name}:Q", title=label_of(name), format=form) for name, form in numbers.items()]


def intervals(
    base: Any, channel: str, value: str, ends: tuple[str, str], *, bar: Mapping[str, Any], size: int = 55, **axis: Any
) -> tuple[Any, Any]:
    """Return bars between the columns `ends` along the channel `x` or `y`, and points of some size at `value`."""
    position = {"x": alt.X, "y": alt.Y}[channel]
    low, high = ends
    bars = base.mark_rule(**bar).encode(**{channel: position(f"{low}:Q", **axis), f"{channel}2": high})
    points = base.mark_point(filled=True, size=size, opacity=1)
    return bars, points.encode(**{channel: position(f"{value}:Q", **axis)})


def zero_line(column: str) -> Any:
    """Return the layer that draws the data set `zero`: where a difference along the x axis is zero."""
    return data("zero").mark_rule(strokeDash=[3, 3]).encode(alt.X(f"{column}:Q"))


def names(x: alt.X, y: alt.Y) -> Any:
    """Return the layer of the names of plans in the data set `front`, beside the points of the layer `points`.

    The page's script moves them apart for the width that the chart has; the later ones are left out without room.
    """
    text = data("front").mark_text(fontSize=11, limit=180)
    return text.encode(x, y, alt.Text("plan:N")).properties(name="names")


def log_bottom(values: Iterable[float], floor: float | None) -> float:
    """Return where a logarithmic axis of these values begins: at the noise floor, or below the least one above it."""
    above = [value for value in values if value > (floor or 0.0)]
    least = min(above, default=floor or 1e-12)
    if floor and math.log10(least / floor) <= _NEAR:
        return floor / 1.5
    return least / 4
