"""Names beside points: apart from each other, in a wide chart and in a narrow one."""

from itertools import combinations
from typing import Any

import pytest

from reports.page.charts import PADDING, Box, label_rows

HEIGHT, LETTER, LINE = 340, 6.5, 11


def points(*places: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [{"plan": plan, "place": x, "value": y, "low": None, "high": None} for plan, x, y in places]


CROWDED = points(
    *(("drop-visual-6", 0.4334, 0.0152), ("dyvte-0.9", 0.4437, 0.0217), ("dyvte-0.99", 0.4829, 0.0304)),
    *(("saisa", 0.4781, 0.0717), ("eas", 0.8876, 0.9848), ("full", 1.0, 0.0174)),
)
FRONT = ["eas", "saisa", "dyvte-0.9", "drop-visual-6"]


def drawn(rows: list[dict[str, Any]], labels: list[dict[str, Any]], *, width: int) -> dict[str, Box]:
    """Where a browser draws the names, by the scales of the chart."""
    lows, spans = zip(
        *((min(ends), max(ends) - min(ends)) for ends in ([row[axis] for row in rows] for axis in ("place", "value"))),
        strict=True,
    )
    found = {}
    for label in labels:
        x = PADDING.x + (width - 2 * PADDING.x) * (label["place"] - lows[0]) / spans[0] + label["dx"]
        y = HEIGHT - PADDING.y - (HEIGHT - 2 * PADDING.y) * (label["value"] - lows[1]) / spans[1] + label["dy"]
        length = LETTER * len(label["plan"])
        left = x - length if label["align"] == "right" else x
        found[label["plan"]] = Box(left, y - LINE, left + length, y + 3)
    return found


@pytest.mark.parametrize(("width", "wide"), [(250, False), (500, False), (600, True), (1050, True)])
def test_names_are_apart_at_every_width(width: int, wide: bool) -> None:
    labels: list[Any] = [row for row in label_rows(CROWDED, FRONT, height=HEIGHT) if row["wide"] == wide]
    boxes = drawn(CROWDED, labels, width=width)
    assert {"eas", "saisa"} <= set(boxes) and len(boxes) >= 3
    assert not any(one.meets(other) for one, other in combinations(boxes.values(), 2))
    assert all(box.left >= 0 and box.right <= width for box in boxes.values())


def test_a_name_without_room_is_left_out() -> None:
    same = points(*((f"plan-{number}", 0.5, 0.5) for number in range(9)), ("far", 1.0, 1.0), ("other", 0.0, 0.0))
    names = [row["plan"] for row in label_rows(same, [row["plan"] for row in same[:-1]], height=HEIGHT) if row["wide"]]
    assert names == ["plan-0", "plan-1", "plan-2", "plan-3", "far"]
