"""What the charts share: colours and shapes, axes, tooltips, intervals, and names beside points."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import altair as alt

from reports.page.campaign_data import KINDS
from reports.page.document import Row, Value, label_of
from shortv.plan import Mode

_MODES: Final = [*(mode.value for mode in Mode if mode is not Mode.FULL), Mode.FULL.value]
# Vega's names, and paths in its box of -1 to 1: a saltire, a star and an hourglass.
_KIND_SHAPES: Final = [
    *("circle", "cross", "triangle-up", "triangle-down", "diamond", "square", "triangle-right", "triangle-left"),
    "M-.9-.5L-.5-.9L0-.4L.5-.9L.9-.5L.4 0L.9 .5L.5 .9L0 .4L-.5 .9L-.9 .5L-.4 0Z",
    "M0-1.1L.3-.4L1.05-.34L.48 .15L.65 .89L0 .5L-.65 .89L-.48 .15L-1.05-.34L-.3-.4Z",
    "M-.85-.9L.85-.9L.2 0L.85 .9L-.85 .9L-.2 0Z",
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
# In pixels: the width of a letter in charts, and of the axis left of most charts.
LETTER: Final = 7
_AXIS: Final = 60


def data(name: str = "rows") -> alt.Chart:
    """Return a chart without marks over one of the data sets of a `Chart`."""
    return alt.Chart(alt.NamedData(name=name))


def colour_of(column: str, shown: Iterable[str], *, left: int = _AXIS, symbols: Any = alt.Undefined) -> alt.Color:
    """Return the colour of the column `mode` or `kind`, the same for a value in every chart.

    The legend, if any, lists the values `shown`; it is right of the axis' labels, `left` pixels wide.
    """
    domain, colours, _ = _SCALES[column]
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
    columns = alt.ExprRef(f"max(1, floor((containerSize()[0] - {left}) / {25 + LETTER * max(map(len, values))}))")
    return alt.Legend(title=None, orient="top", values=values, columns=columns, symbolType=symbols, symbolOpacity=1)


def layer_axis() -> alt.X:
    """Return the axis of decoder layers, which are whole numbers."""
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    return alt.X("layer:Q", title="decoder layer", axis=axis, scale=alt.Scale(nice=False, padding=12))


def layer_bands(column: str = "layer", title: str = "decoder layer") -> alt.X:
    """Return the axis of decoder layers where each is a column of cells."""
    axis = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, ticks=False)
    return alt.X(f"{column}:O", title=title, axis=axis, sort=None)


def lines(column: str, width: int) -> alt.Y:
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


def log_bottom(values: Iterable[float], floor: float | None) -> float:
    """Return where a logarithmic axis of these values begins: at the noise floor, or below the least one above it."""
    above = [value for value in values if value > (floor or 0.0)]
    least = min(above, default=floor or 1e-12)
    if floor and math.log10(least / floor) <= _NEAR:
        return floor / 1.5
    return least / 4


PADDING_X, PADDING_Y = 25, 15
# A chart at least so wide has the names that fit into it, a narrower one those that fit into the least width.
_WIDE, _LEAST = 600, 240
# Of a name: its height and greatest length. Of a point: half its size.
_LINE, _LONGEST, _POINT = 14, 180, 6
_PLACES: Final = [{"align": align, "dx": dx, "dy": dy} for dy in (-8, 15) for align, dx in (("left", 8), ("right", -8))]


class _Box(NamedTuple):
    """A rectangle in pixels, from the upper left; that of a name says where it is relative to its point."""

    left: float
    top: float
    right: float
    bottom: float
    place: Mapping[str, Value] = {}

    def meets(self, other: "_Box") -> bool:
        beside = self.left >= other.right or other.left >= self.right
        return not beside and self.top < other.bottom and other.top < self.bottom


def label_rows(rows: Sequence[Row], plans: Sequence[str], *, height: int) -> list[Row]:
    """Place the names of `plans`, the first ones first; a name without room is left out.

    `rows` are all points of the chart: `plan`, and `place` and `value`, which with the intervals from `low` to `high`
    span the axes. Names that are apart at one width are apart in every wider chart.
    """
    found: list[Row] = []
    by_plan = {row["plan"]: row for row in rows}
    for wide, width in ((True, _WIDE), (False, _LEAST)):
        points = _pixels(rows, width, height)
        covered = [_Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points.values()]
        taken: list[_Box] = []
        for plan in plans:
            boxes = [_name_box(plan, *points[plan], place) for place in _PLACES]
            free = [box for box in boxes if box.left >= 0 and box.right <= width and not any(map(box.meets, taken))]
            if free:
                # Points under a name are hard to see.
                best = min(free, key=lambda box: sum(map(box.meets, covered)))
                taken.append(best)
                point = {name: by_plan[plan][name] for name in ("plan", "place", "value")}
                found.append({**point, **best.place, "wide": wide})
    return found


def label_layer(x: alt.X, y: alt.Y) -> Any:
    """Return the layer that draws the data set `labels`: what is placed for the width that the chart has."""
    place: dict[str, Any] = {name: alt.ExprRef(f"datum.{name}") for name in _PLACES[0]}
    shown = data("labels").transform_filter(f"datum.wide === (width >= {_WIDE})")
    return shown.mark_text(**place, fontSize=11, limit=_LONGEST).encode(x, y, alt.Text("plan:N"))


def _pixels(rows: Sequence[Row], width: int, height: int) -> dict[str, tuple[float, float]]:
    """Return where the chart draws the point of each plan."""

    def scaled(value: float, ends: Sequence[float], size: int, padding: int) -> float:
        span = max(ends) - min(ends)
        return padding + (size - 2 * padding) * ((value - min(ends)) / span if span else 0.5)

    xs = [row["place"] for row in rows]
    ys = [row[name] for row in rows for name in ("value", "low", "high") if row[name] is not None]
    return {
        row["plan"]: (
            scaled(row["place"], xs, width, PADDING_X),
            height - scaled(row["value"], ys, height, PADDING_Y),
        )
        for row in rows
    }


def _name_box(text: str, x: float, y: float, place: Mapping[str, Any]) -> _Box:
    length = min(_LONGEST, LETTER * len(text))
    left = x + place["dx"] - (length if place["align"] == "right" else 0)
    bottom = y + place["dy"] + _LINE / 4
    return _Box(left, bottom - _LINE, left + length, bottom, place)
