"""What the charts share: colours by mode, the axis of layers, logarithmic axes that meet zeros."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import altair as alt

from shortv.plan import Mode

# The page's script gives the colours, by place in this list; `full` is the pale one.
MODES: Final = [*(mode.value for mode in Mode if mode is not Mode.FULL), Mode.FULL.value]
_SHAPES: Final = ["circle", "square", "triangle-up", "triangle-down", "diamond", "cross", "triangle-right", "stroke"]
ROWS: Final = alt.NamedData(name="rows")
# Further below the lowest value than this many decades, a noise floor would press the lines together.
_NEAR: Final = 3
# In pixels: a letter of the charts' text, and what stands left of most charts.
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
    return alt.X("layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False))


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
