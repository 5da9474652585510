"""The heat map of samples and layers; groups of samples where there are many."""

from collections.abc import Sequence
from typing import Final

import altair as alt
import numpy as np
from numpy.typing import NDArray

from reports.page.document import Chart, Grid, Value
from reports.page.marks import ROWS, layer_bands, log_bottom, spec_of

# Up to so many samples have a line each; more are drawn as so many groups.
MOST_LINES: Final = 100
_GROUPS: Final = 50
_NAMED: Final = 30
_QUANTILES: Final = (0.0, 0.1, 0.5, 0.9, 1.0)


def heat_chart(
    mode: str,
    kl_SL: NDArray[np.float64],
    sample_ids: Sequence[str],
    *,
    noise_floor: float | None,
    files: Sequence[str] = (),
    total: int | None = None,
) -> Chart:
    """Draw LC of each sample in each layer, the sample with the highest mean LC on top.

    Of more than `MOST_LINES` samples, a line is the median of a group that follows each other in that order.
    """
    kept = np.flatnonzero(~np.isnan(kl_SL).any(axis=1))
    kl_SL, sample_ids = kl_SL[kept], [sample_ids[int(place)] for place in kept]
    order = np.argsort(-kl_SL.mean(axis=1), kind="stable")
    groups = np.array_split(order, len(order) if len(order) <= MOST_LINES else _GROUPS)
    lines = np.array([np.median(kl_SL[group], axis=0) for group in groups])
    names = _names(groups, sample_ids)
    bottom = log_bottom(lines.ravel().tolist(), noise_floor)
    rows: list[dict[str, Value]] = [
        {"sample": name, "layer": layer, "lc": _rounded(value), "shown": _rounded(max(value, bottom))}
        for name, values in zip(names, lines.tolist(), strict=True)
        for layer, value in enumerate(values)
    ]
    grouped = len(groups) < len(order)
    note = f"{len(order)} samples, the one with the highest mean LC on top; colours are logarithmic."
    if total is not None and total > len(kl_SL):
        note = (
            f"An even choice of {len(order)} of {total} samples, the highest mean LC on top; colours are logarithmic."
        )
    if grouped:
        note += (
            f" A line is the median of {len(groups[-1])} to {len(groups[0])} samples next to each other in that order."
        )
    description = f"Heat map of LC by sample and decoder layer under {mode}. {note}"
    return Chart(
        key=f"heat-{mode}",
        title=f"LC by sample and layer, {mode}",
        note=note,
        description=description,
        spec=_spec(names, description),
        data={"rows": rows},
        numbers=_quantiles(mode, kl_SL, files),
        canvas=True,
        half=True,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _names(groups: Sequence[NDArray[np.int64]], sample_ids: Sequence[str]) -> list[str]:
    if all(len(group) == 1 for group in groups):
        return [sample_ids[int(group[0])] for group in groups]
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [f"samples {end - len(group) + 1} to {end}" for group, end in zip(groups, ends, strict=True)]


def _spec(names: Sequence[str], description: str) -> dict[str, object]:
    named = len(names) <= _NAMED
    # Whole pixels per line and layer: anything else leaves seams between the cells.
    height = len(names) * min(22, max(3, 300 // len(names)))
    axis = alt.Axis(labelLimit=110, ticks=False, domain=False) if named else alt.Axis(labels=False, ticks=False)
    chart = (
        alt.Chart(ROWS)
        .mark_rect()
        .encode(
            layer_bands().scale(round=True),
            alt.Y("sample:N", sort=None, title=None if named else "samples, high LC to low", axis=axis),
            alt.Color(
                "shown:Q",
                scale=alt.Scale(type="log"),
                legend=alt.Legend(
                    title="LC (nats)",
                    format=".0e",
                    orient="right",
                    gradientLength=min(140, max(height, 60)),
                    tickCount=4,
                ),
            ),
            tooltip=[alt.Tooltip("sample:N"), alt.Tooltip("layer:O"), alt.Tooltip("lc:Q", title="LC", format=".2e")],
        )
    )
    return spec_of(chart, height=height, description=description)


def _quantiles(mode: str, kl_SL: NDArray[np.float64], files: Sequence[str]) -> Grid:
    values = np.quantile(kl_SL, _QUANTILES, axis=0)
    rows: list[list[Value]] = [[layer, *column] for layer, column in enumerate(values.T.tolist())]
    columns = ("layer", "least", "10 %", "median", "90 %", "most")
    caption = f"LC of the samples under {mode} in nats, by layer"
    return Grid(caption=caption, columns=columns, rows=rows, files=files)
