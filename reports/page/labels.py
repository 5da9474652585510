"""Names beside points that never cross each other, in a wide chart as in a narrow one."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import altair as alt

from reports.page.document import Value
from reports.page.marks import LETTER


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
    """Where a name stands, seen from its point."""

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
    """Place the names of `plans`, the first ones first; a name that has no room is left out.

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
