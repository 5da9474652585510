"""One campaign against another: metrics of the cells that both have."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import altair as alt

from reports.page.campaign_data import CampaignData, Row, read_campaign_data
from reports.page.document import Chart, Grid, Section, Value, shortened
from reports.page.intervals import interval_of, interval_of_difference
from reports.page.marks import ROWS, spec_of
from reports.store import Folder
from shortv.errors import Refused

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
