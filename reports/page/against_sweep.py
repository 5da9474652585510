"""One sweep against another: rank correlation, layers that moved, the ratio of their LC."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import altair as alt
import numpy as np

from reports.manifest import Manifest, State
from reports.page.correlation import kendall, spearman
from reports.page.document import Chart, Grid, Section, Value
from reports.page.marks import ROWS, colour_of, layer_axis, shape_of, spec_of
from reports.page.sweep_data import SweepData, read_sweep_data
from reports.store import Folder
from reports.tables import by_mode
from shortv.errors import Refused

LayerRow = Mapping[str, Any]
_SAID: Final = ("model", "revision", "config_digest", "kl_direction", "calibration_digest")


def compare_sweeps(data: SweepData, folder: Folder, against: Folder) -> list[Section]:
    """Compare a sweep with another of as many layers.

    Raises:
        Refused: the models differ in depth, one of the runs has no results, or no mode is in both.
        ShortVError: the other folder cannot be read.
    """
    other = read_sweep_data(against, measurements=False)
    _check(data, other, folder, against)
    theirs = by_mode(other.layers)
    floor = max(data.manifest.noise_floor or 0.0, other.manifest.noise_floor or 0.0)
    pairs = {
        mode: list(zip(_in_order(rows), _in_order(theirs[mode]), strict=True))
        for mode, rows in by_mode(data.layers).items()
        if mode in theirs
    }
    text = [
        f"This sweep against {against.shown}, layer by layer. LC at or below {floor:.2e} nats, the larger noise floor, "
        "counts as tied.",
        *_warnings(data.manifest, other.manifest),
    ]
    grids = [_correlations(pairs, floor), _moved(pairs)]
    return [Section(title="Against another sweep", text=text, charts=[_ratio_chart(pairs, floor)], grids=grids)]


def _check(data: SweepData, other: SweepData, folder: Folder, against: Folder) -> None:
    depths = data.manifest.num_layers, other.manifest.num_layers
    if depths[0] != depths[1]:
        raise Refused(
            f"{folder.shown} is of a model with {depths[0]} layers, {against.shown} of one with {depths[1]}; "
            "compare sweeps of models of one depth"
        )
    for one, place in ((data, folder), (other, against)):
        if not one.layers:
            raise Refused(f"{place.shown} has no LC to compare; wait until its sweep has ended")
    if not set(data.modes) & set(other.modes):
        raise Refused(
            f"{folder.shown} measured {', '.join(data.modes)}, {against.shown} {', '.join(other.modes)}; "
            "compare sweeps that share a mode"
        )


def _warnings(own: Manifest, other: Manifest) -> list[str]:
    lines = [
        f"They differ in {name.replace('_', ' ')}: {here or 'none'} here, {there or 'none'} there."
        for name in _SAID
        if (here := getattr(own, name)) != (there := getattr(other, name))
    ]
    if other.state is not State.COMPLETE:
        lines.append(f"The other sweep is {other.state}.")
    return lines


def _in_order(rows: Sequence[LayerRow]) -> list[LayerRow]:
    return sorted(rows, key=lambda row: int(row["layer"]))


def _correlations(pairs: Mapping[str, Sequence[tuple[LayerRow, LayerRow]]], floor: float) -> Grid:
    rows: list[list[Value]] = []
    for mode, rows_of_mode in pairs.items():
        means = [np.maximum([row["mean"] for row in side], floor) for side in zip(*rows_of_mode, strict=True)]
        moved = sum(_is_apart(*pair) for pair in rows_of_mode)
        counts = [rows_of_mode[0][0]["n"], rows_of_mode[0][1]["n"]]
        rows.append([mode, spearman(means[0], means[1]), kendall(means[0], means[1]), moved, *counts])
    columns = ("mode", "Spearman", "Kendall", "layers that moved", "samples here", "samples there")
    return Grid(caption="Rank correlation of LC", columns=columns, rows=rows)


def _is_apart(own: LayerRow, other: LayerRow) -> bool:
    return bool(own["rank_low"] > other["rank_high"] or other["rank_low"] > own["rank_high"])


def _moved(pairs: Mapping[str, Sequence[tuple[LayerRow, LayerRow]]]) -> Grid:
    rows: list[list[Value]] = [
        [
            mode,
            own["layer"],
            own["rank"],
            other["rank"],
            own["rank"] - other["rank"],
            _is_apart(own, other),
            *_lc(own, other),
        ]
        for mode, rows_of_mode in pairs.items()
        for own, other in rows_of_mode
        if own["rank"] != other["rank"]
    ]
    rows.sort(key=lambda row: -abs(int(row[4] or 0)))
    columns = ("mode", "layer", "rank here", "rank there", "change", "intervals apart", "LC here", "LC there")
    return Grid(caption="Layers with another rank, the largest change first", columns=columns, rows=rows)


def _lc(*rows: LayerRow) -> list[float]:
    return [float(row["mean"]) for row in rows]


def _ratio_chart(pairs: Mapping[str, Sequence[tuple[LayerRow, LayerRow]]], floor: float) -> Chart:
    rows: list[dict[str, Value]] = [
        {"mode": mode, "layer": own["layer"], "here": own["mean"], "there": other["mean"]}
        | {"ratio": own["mean"] / other["mean"] if min(own["mean"], other["mean"]) > floor else None}
        for mode, rows_of_mode in pairs.items()
        for own, other in rows_of_mode
    ]
    description = f"Ratio of LC per decoder layer, here over there, for {', '.join(pairs)}."
    scale = alt.Scale(type="log", nice=False)
    y = alt.Y("ratio:Q", scale=scale, title="LC here / LC there", axis=alt.Axis(format="~g", tickCount=6))
    tips = [alt.Tooltip("mode:N"), alt.Tooltip("layer:O"), alt.Tooltip("ratio:Q", format=".3g")]
    base = (
        alt.Chart(ROWS).transform_filter("isValid(datum.ratio)").encode(layer_axis(), y, colour_of(pairs), tooltip=tips)
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(shape_of(pairs))
    one = alt.Chart(alt.NamedData(name="one")).mark_rule(strokeDash=[6, 4]).encode(alt.Y("ratio:Q", scale=scale))
    return Chart(
        key="against",
        title="LC ratio per layer",
        note="Above 1: the layer matters more here. Layers at or below the noise floor in either sweep have no ratio.",
        description=description,
        spec=spec_of(alt.layer(one, base.mark_line(), points), height=280, description=description),
        data={"rows": rows, "one": [{"ratio": 1.0}]},
        numbers=Grid(
            caption="LC here and there in nats",
            columns=("mode", "layer", "here", "there", "ratio"),
            rows=[[row[name] for name in ("mode", "layer", "here", "there", "ratio")] for row in rows],
            files=["lc_layers.parquet"],
        ),
    )
