"""The figure of Layer Contribution per layer."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.atomic import replace_file
from reports.locations import one_line
from reports.tables import by_mode
from shortv.errors import Refused, ShortVError

# Okabe and Ito's colours, told apart with any kind of colour vision; the first two are visual and text.
STYLES: Final[Mapping[str, tuple[str, str]]] = {
    "freeze-visual": ("#0072B2", "o"),
    "freeze-text": ("#D55E00", "s"),
    "no-visual-queries": ("#009E73", "^"),
    "no-visual-ffn": ("#CC79A7", "v"),
    "skip-attention": ("#E69F00", "D"),
    "drop-visual": ("#56B4E9", "P"),
}
_OTHER: Final = ("#444444", "x")
_FORMATS: Final = {".svg": "svg", ".png": "png"}


def save_lc_chart(
    rows: Iterable[Any],
    path: "str | os.PathLike[str]",
    *,
    noise_floor: float | None = None,
    title: str | None = None,
) -> None:
    """Draw LC per layer into an SVG or PNG file, written atomically.

    Raises:
        Refused: there is no row, or the name ends in another suffix.
        ShortVError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise Refused(f"a chart cannot be written as {target.name}; name it .svg or .png")
    data = lc_chart(rows, file_format=_FORMATS[target.suffix.lower()], noise_floor=noise_floor, title=title)
    try:
        replace_file(target, data)
    except OSError as error:
        raise ShortVError(f"{target} could not be written: {one_line(error)}") from error


def lc_chart(
    rows: Iterable[Any], *, file_format: str = "svg", noise_floor: float | None = None, title: str | None = None
) -> bytes:
    """Draw LC per layer on a log axis: one line per mode, its 95 % interval as a band.

    A log axis has no zero: means of zero, or below the noise floor, are drawn on the lower edge as hollow markers.

    Raises:
        Refused: there is no row to draw.
    """
    groups = by_mode(rows)
    if not groups:
        raise Refused("no layer has an LC to draw; the sweep used no sample")
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = _bottom(groups, noise_floor)
    axes.set_yscale("log")
    clipped = [_draw(axes, mode, group, bottom) for mode, group in groups.items()]
    _decorate(axes, groups, bottom, noise_floor, any(clipped))
    axes.set_title(title or "Layer Contribution per decoder layer", loc="left")
    stream = io.BytesIO()
    # Without a date and with fixed element names the same rows give the same bytes.
    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "shortv"}):
        figure.savefig(stream, format=file_format, dpi=150, metadata=metadata)
    return stream.getvalue()


def _bottom(groups: Mapping[str, Sequence[Mapping[str, Any]]], noise_floor: float | None) -> float:
    if noise_floor:
        return noise_floor
    positive = [row["mean"] for group in groups.values() for row in group if row["mean"] > 0]
    return min(positive) / 10 if positive else 1e-12


def _draw(axes: Axes, mode: str, group: Sequence[Mapping[str, Any]], bottom: float) -> bool:
    rows = sorted(group, key=lambda row: int(row["layer"]))
    layers = [int(row["layer"]) for row in rows]
    means = [max(float(row["mean"]), bottom) for row in rows]
    colour, marker = STYLES.get(mode, _OTHER)
    label = f"{mode} (n = {max(int(row['n']) for row in rows)})"
    axes.plot(layers, means, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label, zorder=3)
    low = [max(float(row["ci_low"]), bottom) for row in rows]
    high = [max(float(row["ci_high"]), bottom) for row in rows]
    axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
    below = [layer for layer, row in zip(layers, rows, strict=True) if float(row["mean"]) <= bottom]
    axes.plot(
        below,
        [bottom] * len(below),
        linestyle="none",
        marker=marker,
        markersize=6,
        markerfacecolor="white",
        markeredgecolor=colour,
        zorder=4,
        clip_on=False,
    )
    return bool(below)


def _decorate(
    axes: Axes,
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    bottom: float,
    noise_floor: float | None,
    clipped: bool,
) -> None:
    direction = next(iter(groups.values()))[0]["kl_direction"]
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(f"LC: KL divergence, {direction} (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    top = max(float(row["ci_high"]) for group in groups.values() for row in group)
    axes.set_ylim(bottom / 1.5, max(top, bottom) * 2)
    if noise_floor:
        axes.axhline(noise_floor, color="#444444", linestyle="--", linewidth=1, label="noise floor")
    if clipped:
        text = "hollow: at or below the noise floor" if noise_floor else "hollow: zero"
        axes.plot([], [], linestyle="none", marker="o", markerfacecolor="white", color="#444444", label=text)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
