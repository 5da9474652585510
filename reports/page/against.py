"""One run against another of its kind: what differs between two sweeps, or two campaigns."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import altair as alt
import numpy as np
from numpy.typing import NDArray

from reports.manifest import State, SweepManifest
from reports.page.campaign_data import CampaignData, Row, interval_of, interval_of_difference, read_campaign_data
from reports.page.charts import ROWS, colour_of, layer_axis, shape_of, spec_of
from reports.page.document import Chart, Grid, Section, Value, shortened
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
            raise Refused(f"{place.shown} has no LC to compare; wait until its sweep ends")
    if not set(data.modes) & set(other.modes):
        raise Refused(
            f"{folder.shown} measured {', '.join(data.modes)}, {against.shown} {', '.join(other.modes)}; "
            "compare sweeps that share a mode"
        )


def _warnings(own: SweepManifest, other: SweepManifest) -> list[str]:
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


_COLUMNS: Final = ("task", "plan", "metric", "filter", "here", "there", "difference", "95 % from", "to")
_MOST_DRAWN: Final = 60


class Pair(NamedTuple):
    """A metric that both campaigns have; `same` says what of the cells agrees beyond their names."""

    model: str
    own: Row
    other: Row
    same: str
    is_main: bool

    @property
    def difference(self) -> float:
        """The metric here less the metric there."""
        return float(self.own["value"] - self.other["value"])

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The 95 % interval of the difference, as of two independent runs."""
        own, other = interval_of(self.own), interval_of(self.other)
        if own is None or other is None:
            return None, None
        return interval_of_difference(self.own["value"], own, self.other["value"], other)


def compare_campaigns(data: CampaignData, folder: Folder, against: Folder) -> list[Section]:
    """Compare a campaign with another, cell by cell.

    Cells are the same that have the model, the task, and the plan by digest or else by name; two campaigns of one
    model each are compared whatever it is called.

    Raises:
        Refused: no cell is in both.
        ShortVError: the other folder cannot be read.
    """
    other = read_campaign_data(against)
    pairs = match(data, other)
    if not pairs:
        raise Refused(
            f"no metric of {folder.shown} is in {against.shown} under the same model, plan and task; "
            "compare campaigns that share cells"
        )
    text = [
        f"This campaign against {against.shown}. Intervals take the two runs as independent, which is wide where the "
        "samples are the same.",
    ]
    if other.manifest.state != "complete":
        text.append(f"The other campaign is {other.manifest.state}.")
    if any(pair.same != "plan and task" for pair in pairs):
        text.append("Some cells have the same names but another plan or task: see the last column.")
    charts = [_chart([pair for pair in pairs if pair.is_main])]
    grid = shortened(
        [_row(pair) for pair in pairs], caption="Metrics here and there", columns=("model", *_COLUMNS, "the same")
    )
    return [Section(title="Against another campaign", text=text, charts=[one for one in charts if one], grids=[grid])]


def match(data: CampaignData, other: CampaignData) -> list[Pair]:
    """Pair the metrics of two campaigns, in the order of the first."""
    single = all(len(one.manifest.models) == 1 for one in (data, other))
    tasks = [{cell["cell"]: cell["task_digest"] for cell in one.cells} for one in (data, other)]
    by_digest = {_key(row, "plan_digest", single): row for row in reversed(other.metrics)}
    by_name = {_key(row, "plan", single): row for row in reversed(other.metrics)}
    main = {str(task["name"]): task.get("main_metric") for task in data.manifest.tasks}
    pairs = []
    for row in data.metrics:
        same_plan = by_digest.get(_key(row, "plan_digest", single))
        found = same_plan or by_name.get(_key(row, "plan", single))
        if found is None or row["value"] is None or found["value"] is None:
            continue
        same_task = tasks[0].get(row["cell"]) == tasks[1].get(found["cell"])
        same = {(True, True): "plan and task", (True, False): "plan", (False, True): "task"}.get(
            (same_plan is not None, same_task), "names only"
        )
        pairs.append(Pair(row["model"], row, found, same, row["metric"] == main.get(row["task"])))
    return pairs


def _key(row: Row, plan: str, single: bool) -> tuple[Any, ...]:
    return (None if single else row["model"], row[plan], row["task"], row["metric"], row["filter"])


def _row(pair: Pair) -> list[Value]:
    names = [pair.own[name] for name in ("task", "plan", "metric", "filter", "value")]
    return [pair.model, *names, pair.other["value"], pair.difference, *pair.interval, pair.same]


def _chart(pairs: Sequence[Pair]) -> Chart | None:
    if not pairs:
        return None
    rows: list[Mapping[str, Value]] = []
    for pair in pairs[:_MOST_DRAWN]:
        low, high = pair.interval
        names = {"cell": f"{pair.own['plan']}, {pair.own['task']}", "model": pair.model}
        rows.append(names | {"difference": pair.difference, "low": low, "high": high})
    description = f"Differences of the main metric of {len(rows)} cells, here less there."
    base = alt.Chart(ROWS).encode(alt.Y("cell:N", sort=None, title=None, axis=alt.Axis(labelLimit=320)))
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q", title="difference, here less there"), alt.X2("high"))
    tips = [alt.Tooltip(name) for name in ("model:N", "cell:N", "difference:Q", "low:Q", "high:Q")]
    points = base.mark_point(filled=True, size=60, opacity=1).encode(alt.X("difference:Q"), tooltip=tips)
    zero = alt.Chart(alt.NamedData(name="zero")).mark_rule(strokeDash=[3, 3]).encode(alt.X("difference:Q"))
    return Chart(
        key="against",
        title="Main metric here less there",
        note="Bars: 95 % intervals, as of two independent runs.",
        description=description,
        spec=spec_of(alt.layer(zero, bars, points), height=max(60, 24 * len(rows)), description=description),
        data={"rows": rows, "zero": [{"difference": 0.0}]},
        numbers=Grid(
            caption="Main metric here and there",
            columns=_COLUMNS,
            rows=[_row(pair)[1:-1] for pair in pairs],
            files=["metrics.parquet"],
        ),
    )


Values = NDArray[np.float64]


def spearman(first_L: Values, second_L: Values) -> float | None:
    """Return Spearman's rho, tied values sharing their mean rank; None where one side is all ties."""
    first, second = (ranks - ranks.mean() for ranks in (_mean_ranks(first_L), _mean_ranks(second_L)))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else None


def kendall(first_L: Values, second_L: Values) -> float | None:
    """Return Kendall's tau-b; None where one side is all ties."""
    signs = [np.sign(values[:, None] - values[None, :]) for values in (first_L, second_L)]
    scale = np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float((signs[0] * signs[1]).sum() / scale) if scale else None


def _mean_ranks(values_L: Values) -> Values:
    _, places, counts = np.unique(values_L, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Values = (last - (counts - 1) / 2)[places]
    return ranks
