"""The charts of a sweep: LC and rank of every layer, plans as strips, and LC by sample and layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import altair as alt
import numpy as np
from numpy.typing import NDArray

from reports.page.charts import LETTER, ROWS, colour_of, layer_axis, layer_bands, log_bottom, shape_of, spec_of
from reports.page.document import Chart, Grid, Value
from reports.tables import by_mode

LayerRows = Sequence[Mapping[str, Any]]
# Of the names of plans, in pixels.
_LABELS: Final = 240
_TIP: Final = [
    alt.Tooltip("mode:N"),
    alt.Tooltip("layer:O"),
    alt.Tooltip("mean:Q", title="LC (nats)", format=".3e"),
    alt.Tooltip("ci_low:Q", title="95 % from", format=".3e"),
    alt.Tooltip("ci_high:Q", title="to", format=".3e"),
    alt.Tooltip("n:Q", title="samples"),
]


def lc_chart(layers: LayerRows, *, noise_floor: float | None, changed: Mapping[tuple[str, int], float]) -> Chart:
    """Draw LC per layer: a line and a 95 % band per mode; zeros, which a log axis lacks, are hollow at its edge."""
    bottom = log_bottom((row["mean"] for row in layers), noise_floor)
    names = ("mode", "layer", "mean", "ci_low", "ci_high", "n")
    rows = [
        {name: row[name] for name in names}
        | {"low": max(row["ci_low"], bottom), "high": max(row["ci_high"], bottom), "y": max(row["mean"], bottom)}
        | {"hollow": row["mean"] <= (noise_floor or 0.0)}
        for row in layers
    ]
    direction = layers[0]["kl_direction"]
    hollow = sum(bool(row["hollow"]) for row in rows)
    note = f"Mean KL divergence ({direction}) of the next-token distribution, with 95 % bootstrap bands."
    note += f" Noise floor {noise_floor:.2e} nats." if noise_floor else " No noise floor is known."
    if hollow:
        at = "at or below the noise floor" if noise_floor else "zero"
        note += f" Hollow: {at}, drawn no lower than the axis reaches."
    modes = by_mode(layers)
    description = f"Line chart of LC per decoder layer for {', '.join(modes)}. " + " ".join(
        map(_extremes, modes.values())
    )
    return Chart(
        key="lc",
        title="Layer Contribution per layer",
        note=note,
        description=description,
        spec=spec_of(_lc_layers(list(modes), bottom, noise_floor), height=340, description=description),
        data={"rows": rows, "floor": [{"floor": max(noise_floor or 0.0, bottom)}]},
        numbers=_lc_numbers(layers, changed),
    )


def _lc_layers(modes: list[str], bottom: float, noise_floor: float | None) -> Any:
    scale = alt.Scale(type="log", domainMin=bottom, nice=False)
    base = alt.Chart(ROWS).encode(layer_axis(), colour_of(modes))
    band = base.mark_area(opacity=0.18, clip=True).encode(
        alt.Y("low:Q", scale=scale, title="LC (nats)", axis=alt.Axis(format=".0e", tickCount=6)), alt.Y2("high")
    )
    line = base.mark_line(clip=False).encode(alt.Y("y:Q", scale=scale))
    points = base.encode(
        alt.Y("y:Q", scale=scale),
        shape_of(modes),
        tooltip=_TIP,
    )
    filled = points.transform_filter("!datum.hollow").mark_point(filled=True, size=55, opacity=1)
    hollow = points.transform_filter("datum.hollow").mark_point(filled=False, size=80, strokeWidth=2, opacity=1)
    return alt.layer(band, line, filled, hollow, *_floor_layers(noise_floor, bottom, scale))


def _floor_layers(noise_floor: float | None, bottom: float, scale: alt.Scale) -> list[Any]:
    """A dashed line at the noise floor; of one below the axis, the name alone."""
    if not noise_floor:
        return []
    inside = noise_floor >= bottom
    text = f"{'' if inside else 'below: '}noise floor {noise_floor:.1e}"
    floor = alt.Chart(alt.NamedData(name="floor")).encode(alt.Y("floor:Q", scale=scale))
    label = floor.mark_text(align="left", baseline="bottom", dx=4, dy=-3, text=text).encode(x=alt.value(0))
    return [floor.mark_rule(strokeDash=[6, 4]), label] if inside else [label]


def _extremes(rows: LayerRows) -> str:
    low, high = (choose(rows, key=lambda row: float(row["mean"])) for choose in (min, max))
    return (
        f"{low['mode']}: lowest {low['mean']:.2e} nats in layer {low['layer']}, "
        f"highest {high['mean']:.2e} in layer {high['layer']}."
    )


def _lc_numbers(layers: LayerRows, changed: Mapping[tuple[str, int], float]) -> Grid:
    names = ("mode", "layer", "rank", "mean", "ci_low", "ci_high", "rank_low", "rank_high", "n")
    shown = ("mode", "layer", "rank", "LC (nats)", "95 % from", "to", "rank from", "to", "samples", "top token changed")
    rows = [[*(row[name] for name in names), changed.get((row["mode"], row["layer"]))] for row in layers]
    return Grid(caption="LC and rank of every layer", columns=shown, rows=rows, files=["lc_layers.parquet"])


def rank_chart(mode: str, rows: LayerRows) -> Chart:
    """Draw the rank of every layer of one mode with its 95 % interval, rank 1 on top."""
    ranked = sorted(rows, key=lambda row: int(row["rank"]))
    names = ("mode", "layer", "rank", "rank_low", "rank_high")
    first = ", ".join(str(row["layer"]) for row in ranked[:5])
    description = f"Rank of every decoder layer under {mode} with intervals. Replaced first: layers {first}."
    scale = alt.Scale(reverse=True, domain=[0.5, len(rows) + 0.5], nice=False)
    axis = alt.Axis(format="d", tickMinStep=1)
    tips = [alt.Tooltip(f"{name}:O") for name in names[1:]]
    base = alt.Chart(ROWS).encode(layer_axis(), colour_of([], legend=False), tooltip=tips)
    rules = base.mark_rule(strokeWidth=3, opacity=0.5).encode(
        alt.Y("rank_low:Q", scale=scale, axis=axis, title="rank (1 is replaced first)"), alt.Y2("rank_high")
    )
    points = base.mark_point(filled=True, size=50, opacity=1).encode(alt.Y("rank:Q", scale=scale))
    return Chart(
        key=f"rank-{mode}",
        title=f"Rank intervals, {mode}",
        note="Point: the rank. Bar: its 95 % interval over bootstrap resamples of the samples.",
        description=description,
        spec=spec_of(alt.layer(rules, points), height=240, description=description),
        data={"rows": [{name: row[name] for name in names} for row in rows]},
        numbers=Grid(
            caption=f"Ranking under {mode}",
            columns=("rank", "layer", "rank from", "to", "LC (nats)"),
            rows=[[row[name] for name in ("rank", "layer", "rank_low", "rank_high", "mean")] for row in ranked],
            files=["lc_layers.parquet"],
        ),
        half=True,
    )


def plan_strips(
    plans: Sequence[tuple[str, Sequence[str]]], *, of: str, key: str = "plans", files: Sequence[str] = ()
) -> Chart:
    """Draw plans (name and modes) as strips of layers, one colour per mode."""
    rows: list[dict[str, Value]] = [
        {"plan": name, "layer": layer, "mode": mode} for name, modes in plans for layer, mode in enumerate(modes)
    ]
    description = "Strips of decoder layers coloured by mode. " + " ".join(
        f"{name}: {_changed(modes)} of {len(modes)} layers under another mode than full." for name, modes in plans[:12]
    )
    left = min(_LABELS, LETTER * max((len(name) for name, _ in plans), default=0))
    chart = (
        alt.Chart(ROWS)
        .mark_rect(cornerRadius=2)
        .encode(
            layer_bands().scale(paddingInner=0.08),
            alt.Y("plan:N", sort=None, title=None, axis=alt.Axis(labelLimit=_LABELS, ticks=False, domain=False)).scale(
                paddingInner=0.25
            ),
            colour_of({mode for _, modes in plans for mode in modes}, symbols="square", left=left),
            tooltip=[alt.Tooltip("plan:N"), alt.Tooltip("layer:O"), alt.Tooltip("mode:N")],
        )
    )
    counted: list[list[Value]] = [
        [name, len(modes), _changed(modes), ", ".join(_layers_by_mode(modes))] for name, modes in plans
    ]
    return Chart(
        key=key,
        title=f"Plans of {of}, layer by layer",
        note="One strip per plan, from the first decoder layer to the last.",
        description=description,
        spec=spec_of(chart, height=max(40, 26 * len({name for name, _ in plans})), description=description),
        data={"rows": rows},
        numbers=Grid(caption="Plans", columns=("plan", "layers", "not full", "modes"), rows=counted, files=files),
    )


def _changed(modes: Sequence[str]) -> int:
    return sum(mode != "full" for mode in modes)


def _layers_by_mode(modes: Sequence[str]) -> list[str]:
    found: dict[str, list[str]] = {}
    for layer, mode in enumerate(modes):
        found.setdefault(mode, []).append(str(layer))
    return [f"{mode}: {' '.join(layers)}" for mode, layers in found.items() if mode != "full"]


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
