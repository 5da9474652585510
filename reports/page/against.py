"""One run against another of its kind: what differs between two sweeps, or two campaigns."""

from collections.abc import Sequence
from typing import Final

import altair as alt
import numpy as np
from numpy.typing import NDArray

from reports.manifest import State
from reports.page.campaign_data import CampaignData, difference_of, read_campaign_data
from reports.page.charts import colour_of, data, intervals, layer_axis, shape_of, tips, zero_line
from reports.page.document import MOST_ROWS, Chart, Row, Section, grid
from reports.page.sweep_data import SweepData, read_sweep_data
from reports.store import Folder
from reports.tables import by_mode
from shortv.errors import Refused

_SAID: Final = ("model", "revision", "config_digest", "kl_direction", "calibration_digest")
_MOST_DRAWN: Final = 60


def compare_sweeps(own: SweepData, folder: Folder, against: Folder) -> list[Section]:
    """Compare a sweep with another of as many layers.

    Raises:
        Refused: the models differ in depth, one of the runs has no results, or no mode is in both.
        ShortVError: the other folder cannot be read.
    """
    other = read_sweep_data(against, measurements=False)
    _check(own, other, folder, against)
    floor = max(own.manifest.noise_floor or 0.0, other.manifest.noise_floor or 0.0)
    rows = _layer_pairs(own, other, floor)
    text = [
        f"This sweep against {against.shown}, layer by layer. LC at or below {floor:.2e} nats, the larger noise floor, "
        "counts as tied."
    ]
    for name in _SAID:
        here, there = getattr(own.manifest, name), getattr(other.manifest, name)
        if here != there:
            text.append(f"They differ in {name.replace('_', ' ')}: {here or 'none'} here, {there or 'none'} there.")
    if other.manifest.state is not State.COMPLETE:
        text.append(f"The other sweep is {other.manifest.state}.")
    ranked = grid(
        "Rank correlation of LC",
        [_ranked(mode, pairs, floor) for mode, pairs in by_mode(rows).items()],
        "mode Spearman Kendall layers_that_moved samples_here samples_there",
    )
    moved = grid(
        "Layers with another rank, the largest change first",
        sorted((row for row in rows if row["change"]), key=lambda row: -abs(row["change"])),
        "mode layer rank_here rank_there change intervals_apart LC_here LC_there",
    )
    return [Section(title="Against another sweep", text=text, charts=[_ratio_chart(rows)], grids=[ranked, moved])]


def _check(own: SweepData, other: SweepData, folder: Folder, against: Folder) -> None:
    depths = own.manifest.num_layers, other.manifest.num_layers
    if depths[0] != depths[1]:
        raise Refused(
            f"{folder.shown} is of a model with {depths[0]} layers, {against.shown} of one with {depths[1]}; "
            "compare sweeps of models of one depth"
        )
    for one, place in ((own, folder), (other, against)):
        if not one.layers:
            raise Refused(f"{place.shown} has no LC to compare; wait until its sweep ends")
    if not set(own.modes) & set(other.modes):
        raise Refused(
            f"{folder.shown} measured {', '.join(own.modes)}, {against.shown} {', '.join(other.modes)}; "
            "compare sweeps that share a mode"
        )


def _layer_pairs(own: SweepData, other: SweepData, floor: float) -> list[Row]:
    """Return a row for each mode and layer that both sweeps measured, mode by mode."""
    theirs = {(row["mode"], row["layer"]): row for row in other.layers}
    rows: list[Row] = []
    for here in sorted(own.layers, key=lambda row: (own.modes.index(row["mode"]), row["layer"])):
        there = theirs.get((here["mode"], here["layer"]))
        if there is not None:
            apart = here["rank_low"] > there["rank_high"] or there["rank_low"] > here["rank_high"]
            known = min(here["mean"], there["mean"]) > floor
            rows.append(
                {"mode": here["mode"], "layer": here["layer"], "intervals_apart": apart}
                | {"LC_here": here["mean"], "LC_there": there["mean"]}
                | {"ratio": here["mean"] / there["mean"] if known else None}
                | {"rank_here": here["rank"], "rank_there": there["rank"], "change": here["rank"] - there["rank"]}
                | {"samples_here": here["n"], "samples_there": there["n"]}
            )
    return rows


def _ranked(mode: str, pairs: Sequence[Row], floor: float) -> Row:
    spearman, kendall = correlations(
        *(np.maximum([row[name] for row in pairs], floor) for name in ("LC_here", "LC_there"))
    )
    moved = sum(row["intervals_apart"] for row in pairs)
    return {**pairs[0], "mode": mode, "Spearman": spearman, "Kendall": kendall, "layers_that_moved": moved}


def correlations(first_L: NDArray[np.float64], second_L: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Return Spearman's rho, tied values sharing their mean rank, and Kendall's tau-b; None if one side is all ties."""
    signs = [np.sign(np.subtract.outer(values, values)) for values in (first_L, second_L)]
    # Twice the mean rank of a value, less that of all, is how many values are below it less how many are above it.
    return _cosine(*(sign.sum(axis=1) for sign in signs)), _cosine(*signs)


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else None


def _ratio_chart(rows: Sequence[Row]) -> Chart:
    modes = list(by_mode(rows))
    scale = alt.Scale(type="log", nice=False)
    y = alt.Y("ratio:Q", scale=scale, title="LC here / LC there", axis=alt.Axis(format="~g", tickCount=6))
    base = data().transform_filter("isValid(datum.ratio)")
    base = base.encode(layer_axis(), y, colour_of("mode", modes), tooltip=tips("mode layer", ratio=".3g"))
    points = base.mark_point(filled=True, size=55, opacity=1).encode(shape_of("mode", modes))
    one = data("one").mark_rule(strokeDash=[6, 4]).encode(alt.Y("ratio:Q", scale=scale))
    return Chart(
        key="against",
        title="LC ratio per layer",
        note="Above 1: the layer matters more here. Layers at or below the noise floor in either sweep have no ratio.",
        description=f"Ratio of LC per decoder layer, here over there, for {', '.join(modes)}.",
        marks=alt.layer(one, base.mark_line(), points),
        height=280,
        data={"rows": rows, "one": [{"ratio": 1.0}]},
        numbers=grid(
            "LC here and there in nats",
            rows,
            "mode layer LC_here LC_there ratio",
            files=["lc_layers.parquet"],
            LC_here="here",
            LC_there="there",
        ),
    )


def compare_campaigns(own: CampaignData, folder: Folder, against: Folder) -> list[Section]:
    """Compare a campaign with another, cell by cell.

    Cells are the same that have the model, the task, and the plan by digest or else by name; two campaigns of one
    model each are compared whatever it is called.

    Raises:
        Refused: no cell is in both.
        ShortVError: the other folder cannot be read.
    """
    other = read_campaign_data(against)
    rows = metric_pairs(own, other)
    if not rows:
        raise Refused(
            f"no metric of {folder.shown} is in {against.shown} under the same model, plan and task; "
            "compare campaigns that share cells"
        )
    text = [
        f"This campaign against {against.shown}. Intervals take the two runs as independent, which is wide where the "
        "samples are the same.",
    ]
    if other.manifest.state is not State.COMPLETE:
        text.append(f"The other campaign is {other.manifest.state}.")
    if any(row["the_same"] != "plan and task" for row in rows):
        text.append("Some cells have the same names but another plan or task: see the last column.")
    main = {str(task["name"]): task.get("main_metric") for task in own.manifest.tasks}
    judged = [row for row in rows if row["metric"] == main.get(row["task"])]
    columns = "model task plan metric filter here there difference low high the_same"
    return [
        Section(
            title="Against another campaign",
            text=text,
            charts=[_difference_chart(judged)] if judged else [],
            grids=[grid("Metrics here and there", rows, columns, most=MOST_ROWS)],
        )
    ]


def metric_pairs(own: CampaignData, other: CampaignData) -> list[Row]:
    """Return a row for each metric that both campaigns have, in the order of the first.

    It holds the metric `here` and `there`, their `difference` with the 95 % interval from `low` to `high` as of two
    independent runs, and what of the cells is `the_same` beyond their names.
    """
    single = all(len(one.manifest.models) == 1 for one in (own, other))
    tasks, their_tasks = ({cell["cell"]: cell["task_digest"] for cell in one.cells} for one in (own, other))

    def key(row: Row, plan: str) -> Sequence[str | None]:
        return (None if single else row["model"], plan, row[plan], row["task"], row["metric"], row["filter"])

    theirs = {key(row, plan): row for plan in ("plan", "plan_digest") for row in reversed(other.metrics)}
    rows: list[Row] = []
    for here in own.metrics:
        by_digest = theirs.get(key(here, "plan_digest"))
        there = by_digest or theirs.get(key(here, "plan"))
        if there is None or here["value"] is None or there["value"] is None:
            continue
        same = {"plan": by_digest, "task": tasks.get(here["cell"]) == their_tasks.get(there["cell"])}
        rows.append(
            {name: here[name] for name in ("model", "task", "plan", "metric", "filter")}
            | {"here": here["value"], "there": there["value"], **difference_of(here, there)}
            | {"the_same": " and ".join(name for name, found in same.items() if found) or "names only"}
        )
    return rows


def _difference_chart(rows: Sequence[Row]) -> Chart:
    drawn = [{**row, "cell": f"{row['plan']}, {row['task']}"} for row in rows[:_MOST_DRAWN]]
    base = data().encode(alt.Y("cell:N", sort=None, title=None, axis=alt.Axis(labelLimit=320)))
    bars, points = intervals(
        base,
        "x",
        "difference",
        ("low", "high"),
        bar={"strokeWidth": 2},
        size=60,
        title="difference, here less there",
    )
    said = tips("model cell", difference="", low="", high="")
    return Chart(
        key="against",
        title="Main metric here less there",
        note="Bars: 95 % intervals, as of two independent runs.",
        description=f"Differences of the main metric of {len(drawn)} cells, here less there.",
        marks=alt.layer(zero_line("difference"), bars, points.encode(tooltip=said)),
        height=max(60, 24 * len(drawn)),
        data={"rows": drawn, "zero": [{"difference": 0.0}]},
        numbers=grid(
            "Main metric here and there",
            rows,
            "task plan metric filter here there difference low high",
            files=["metrics.parquet"],
        ),
    )
