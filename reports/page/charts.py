"""What the charts share: colours, shapes and names of their points, axes of layers, logarithmic axes with zeros."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import altair as alt

from reports.page.campaign_data import KINDS
from reports.page.document import Value
from shortv.plan import Mode

# The page's script gives the colours, by place in this list; `full` is the pale one.
MODES: Final = [*(mode.value for mode in Mode if mode is not Mode.FULL), Mode.FULL.value]
_SHAPES: Final = ["circle", "square", "triangle-up", "triangle-down", "diamond", "cross", "triangle-right", "stroke"]
ROWS: Final = alt.NamedData(name="rows")
# Further below the lowest value than this many decades, a noise floor would press the lines together.
_NEAR: Final = 3
# In pixels: the width of a letter in charts, and of the axis left of most charts.
LETTER: Final = 7
_AXIS: Final = 60


def colour_of(
    names: Iterable[str], *, legend: bool = True, symbols: Any = alt.Undefined, left: int = _AXIS
) -> alt.Color:
    """Return the colour of the column `mode`, the same for a mode in every chart; the legend lists `names`."""
    shown = _legend(names, symbols, left) if legend else None
    return alt.Color("mode:N", scale=alt.Scale(domain=MODES), legend=shown)


def shape_of(names: Iterable[str]) -> alt.Shape:
    """Return the shape of points by the column `mode`; its legend is one with that of the colour."""
    return alt.Shape(
        "mode:N", scale=alt.Scale(domain=MODES, range=_SHAPES), legend=_legend(names, alt.Undefined, _AXIS)
    )


def _legend(names: Iterable[str], symbols: Any, left: int) -> alt.Legend:
    shown = [name for name in MODES if name in set(names)]
    columns = fitting_columns(shown, left)
    return alt.Legend(title=None, orient="top", values=shown, columns=columns, symbolType=symbols, symbolOpacity=1)


def fitting_columns(names: Iterable[str], left: int = _AXIS) -> Any:
    """Return how many columns of a legend with these names fit right of the axis' labels, `left` pixels wide."""
    widest = 25 + LETTER * max(map(len, names), default=0)
    # How wide the chart is, only the browser knows.
    return alt.ExprRef(f"max(1, floor((containerSize()[0] - {left}) / {widest}))")


def layer_axis() -> alt.X:
    """Return the axis of decoder layers, which are whole numbers."""
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    return alt.X("layer:Q", title="decoder layer", axis=axis, scale=alt.Scale(nice=False, padding=12))


def layer_bands() -> alt.X:
    """Return the axis of decoder layers where each is a column of cells."""
    return alt.X(
        "layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, ticks=False)
    )


def log_bottom(values: Iterable[float], floor: float | None) -> float:
    """Return where a logarithmic axis of these values begins: at the noise floor, or below the least one above it."""
    above = [value for value in values if value > (floor or 0.0)]
    least = min(above, default=floor or 1e-12)
    if floor and math.log10(least / floor) <= _NEAR:
        return floor / 1.5
    return least / 4


def spec_of(chart: Any, *, height: int | None = None, description: str) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart as wide as its place."""
    size: dict[str, Any] = {"width": "container"} | ({} if height is None else {"height": height})
    whole = chart.properties(
        **size, description=description, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )
    spec: Mapping[str, Any] = whole.to_dict()
    return {name: value for name, value in spec.items() if name != "config"}


class Padding(NamedTuple):
    """Pixels between the edges of a chart and its outermost points."""

    x: int
    y: int


class Box(NamedTuple):
    """A rectangle in pixels, from the upper left."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Tell whether two of them share a place."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class Place(NamedTuple):
    """The position of a name relative to its point."""

    align: str
    dx: int
    dy: int


PADDING: Final = Padding(x=25, y=15)
# A chart at least so wide has the names that fit into it, a narrower one those that fit into the least width.
_WIDE: Final = 600
_LEAST: Final = 240
_PLACES: Final = [Place(align, dx, dy) for dy in (-8, 15) for align, dx in (("left", 8), ("right", -8))]
_LINE: Final = 14
_LONGEST: Final = 180
_POINT: Final = 6


def label_rows(rows: Sequence[Mapping[str, Any]], plans: Sequence[str], *, height: int) -> list[dict[str, Value]]:
    """Place the names of `plans`, the first ones first; a name without room is left out.

    `rows` are all points of the chart: `plan`, and `place` and `value`, which with the intervals from `low` to `high`
    span the axes. Names that are apart at one width are apart in every wider chart.
    """
    return [
        {"plan": row["plan"], "place": row["place"], "value": row["value"], "wide": wide} | place._asdict()
        for wide, width in ((True, _WIDE), (False, _LEAST))
        for row, place in _placed(rows, plans, width, height)
    ]


def label_layer(x: alt.X, y: alt.Y) -> Any:
    """Return the layer that draws the data set `labels`: what is placed for the width that the chart has."""
    align, dx, dy = (alt.ExprRef(f"datum.{name}") for name in Place._fields)
    return (
        alt.Chart(alt.NamedData(name="labels"))
        .transform_filter(f"datum.wide === (width >= {_WIDE})")
        .mark_text(align=align, dx=dx, dy=dy, fontSize=11, limit=_LONGEST)
        .encode(x, y, alt.Text("plan:N"))
    )


def _placed(
    rows: Sequence[Mapping[str, Any]], plans: Sequence[str], width: int, height: int
) -> list[tuple[Mapping[str, Any], Place]]:
    ends = [row[name] for row in rows for name in ("value", "low", "high") if row[name] is not None]
    xs = _pixels([row["place"] for row in rows], [row["place"] for row in rows], width, PADDING.x)
    ys = [height - y for y in _pixels([row["value"] for row in rows], ends, height, PADDING.y)]
    points = [Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in zip(xs, ys, strict=True)]
    named = {row["plan"]: number for number, row in enumerate(rows)}
    found: list[tuple[Mapping[str, Any], Place]] = []
    taken: list[Box] = []
    for plan in plans:
        x, y = xs[named[plan]], ys[named[plan]]
        boxes = {place: _box(plan, x, y, place) for place in _PLACES}
        free = {
            place: box
            for place, box in boxes.items()
            if box.left >= 0 and box.right <= width and not any(box.meets(other) for other in taken)
        }
        if free:
            # Points under a name are hard to see.
            best = min(free, key=lambda place: sum(free[place].meets(point) for point in points))
            found.append((rows[named[plan]], best))
            taken.append(free[best])
    return found


def _pixels(values: Sequence[float], ends: Sequence[float], size: int, padding: int) -> list[float]:
    low, span = min(ends), max(ends) - min(ends)
    return [padding + (size - 2 * padding) * ((value - low) / span if span else 0.5) for value in values]


def _box(text: str, x: float, y: float, place: Place) -> Box:
    length = min(_LONGEST, LETTER * len(text))
    left = x + place.dx - (length if place.align == "right" else 0)
    bottom = y + place.dy + _LINE / 4
    return Box(left, bottom - _LINE, left + length, bottom)


# Vega's names, and paths in its box of -1 to 1: a saltire, a star and an hourglass.
_KIND_SHAPES: Final = [
    *("circle", "cross", "triangle-up", "triangle-down", "diamond", "square", "triangle-right", "triangle-left"),
    "M-.9-.5L-.5-.9L0-.4L.5-.9L.9-.5L.4 0L.9 .5L.5 .9L0 .4L-.5 .9L-.9 .5L-.4 0Z",
    "M0-1.1L.3-.4L1.05-.34L.48 .15L.65 .89L0 .5L-.65 .89L-.48 .15L-1.05-.34L-.3-.4Z",
    "M-.85-.9L.85-.9L.2 0L.85 .9L-.85 .9L-.2 0Z",
]


def kind_colour(kinds: set[str]) -> alt.Color:
    """Return the colour of the column `kind`; the legend lists `kinds`."""
    # Vega-Lite accepts no range names but its own: the page's script puts the colours of kinds into this one.
    return alt.Color("kind:N", scale=alt.Scale(domain=KINDS, range="ordinal"), legend=_kind_legend(kinds))


def kind_shape(kinds: set[str]) -> alt.Shape:
    """Return the shape of the column `kind`, in one legend with its colour."""
    return alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=_KIND_SHAPES), legend=_kind_legend(kinds))


def _kind_legend(kinds: set[str]) -> alt.Legend:
    shown = [kind for kind in KINDS if kind in kinds]
    return alt.Legend(title=None, orient="top", values=shown, columns=fitting_columns(shown), symbolOpacity=1)


def tips(*fields: tuple[str, str | None]) -> list[alt.Tooltip]:
    """Return the plan and these columns, numbers with their format, as what a point says."""
    formatted = [alt.Tooltip(f"{name}:Q", format=form) if form else alt.Tooltip(f"{name}:N") for name, form in fields]
    return [alt.Tooltip("plan:N"), *formatted]
