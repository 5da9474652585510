"""The page of a campaign folder: accuracy and speed against FLOPs, differences, exit layers, plans and errors."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import altair as alt

from reports.manifest import CampaignManifest, State
from reports.page.campaign_data import KINDS, LEARNED, CampaignData, Group, interval_note, kind_of_plan, parts_of_plan
from reports.page.changed import cards_of, counts_of
from reports.page.charts import colour_of, data, intervals, layer_bands, line_axis, names, shape_of, tips, zero_line
from reports.page.document import MOST_ROWS, Chart, Fact, Grid, Page, Row, Section, grid
from reports.page.ran import ran, state_warnings
from reports.page.sweep import plan_strips

# Nobody looks at strips of more plans of one model.
MOST_STRIPS: Final = 60
# Between two plans of the same FLOPs, as a share of the axis.
_STEP: Final = 0.008
_HEIGHT: Final = 340


def campaign_page(campaign: CampaignData) -> Page:
    """Lay out the page of a campaign."""
    manifest = campaign.manifest
    models, tasks = (", ".join(str(item["name"]) for item in items) for items in (manifest.models, manifest.tasks))
    unfinished = [] if campaign.cells else ["No cell has finished yet."]
    return Page(
        title=f"Campaign: {models} on {tasks}",
        state=str(manifest.state),
        warnings=[*state_warnings(manifest, "samples or cells"), *unfinished, *campaign.answered.problems],
        headline=_headline(campaign),
        sections=[*_results(campaign), _plans(manifest), _errors(campaign), _ran(manifest)],
    )


def _headline(campaign: CampaignData) -> list[Fact]:
    counts, manifest, cells = campaign.manifest.counts, campaign.manifest, campaign.cells
    running = manifest.state is State.RUNNING
    return [
        ("models", len(manifest.models)),
        ("plans", len(manifest.plans)),
        ("tasks", len(manifest.tasks)),
        ("cells finished", len({row["cell"] for row in cells}) if running else counts.get("cells")),
        ("cells failed or partial", len(_failed(cells))),
        ("samples", sum(row["n"] for row in cells) if running else counts.get("samples")),
        *([("answers so far", campaign.answered.samples)] if running else []),
        ("samples with errors", sum(row["errors"] for row in cells) if running else counts.get("errors")),
    ]


def _failed(cells: Sequence[Row]) -> list[Row]:
    return [row for row in cells if row["state"] != "complete" and row["same_as"] is None]


def _results(campaign: CampaignData) -> list[Section]:
    groups = list(enumerate(campaign.groups()))
    accuracy = [accuracy_chart(group, number) for number, group in groups]
    pairs = [draw(group, number) for number, group in groups for draw in (difference_chart, speed_chart)]
    differences = _differences(
        "Every metric of every plan against the full model and its random controls",
        campaign.comparisons,
        "model task metric plan against subset value against_value difference ci_low ci_high p_value p_holm q_bh n "
        "share_changed",
        most=MOST_ROWS,
    )
    metrics = grid(
        "Every metric of every cell, kinds of documents included",
        campaign.metrics,
        "model task plan metric filter value low high interval_by n",
        files=["metrics.parquet"],
        most=MOST_ROWS,
        n="documents",
    )
    sections = [
        Section(title="Accuracy against FLOPs", charts=[chart for chart in accuracy if chart]),
        Section(title="Differences and speed", charts=[chart for chart in pairs if chart]),
        _changed(campaign),
        Section(title="Exit layers", charts=exit_charts(campaign.answered.exits, campaign.answered.parts)),
        Section(title="All differences", text=[_TESTED], grids=[differences]),
        Section(title="All speeds", grids=[_speeds(group for _, group in groups)]),
        Section(title="All metrics", grids=[metrics]),
    ]
    return [section for section in sections if section.charts or any(table.rows for table in section.grids)]


def _changed(campaign: CampaignData) -> Section:
    """Return the section to look at questions whose answers a plan changed."""
    cards = cards_of(campaign.changed)
    counts = grid(
        "Answers that differ from the full model's, by the task's main metric",
        counts_of(campaign.changed),
        "model task plan worse better other",
        files=["changes.parquet"],
        most=MOST_ROWS,
        other="neither",
    )
    text = [
        "Questions whose answer under a plan differs from the full model's; those that most plans answered worse come "
        "first. A plan has at most 50, some of each kind of change, spread over the task."
    ]
    if cards and cards.shown < cards.total:
        text.append(f"{cards.shown} of the {cards.total} answers in changes.parquet are on this page.")
    return Section(title="Changed answers", text=text, cards=cards, grids=[counts])


def _speeds(groups: Iterable[Group]) -> Grid:
    """Return a table of the speed of every plan."""
    rows = [{**point, "model": group.model, "task": group.task} for group in groups for point in group.points]
    return grid(
        "Speed of every plan: prefill, decoding step, first token and memory of one measured batch; samples by the "
        "model's own time; medians over all answers",
        [row for row in rows if row["prefill_ratio"] is not None or row["latency_ms_median"] is not None],
        "model task plan flops_ratio prefill_ratio batch_prefill_ms step_ms ttft_ms kv_bytes peak_bytes "
        "samples_per_second idle_share preprocess_ms_median vision_ms_median latency_ms_median",
        files=["speed.parquet"],
        most=MOST_ROWS,
    )


_TESTED = (
    "p is two-sided and paired; p (Holm) and q are corrected for all models, plans and tasks of the campaign. The hard "
    "subset holds the questions that the first downsampled control gets wrong."
)


def _differences(caption: str, rows: Sequence[Row], columns: str, most: int | None = None) -> Grid:
    """Return a table of comparisons; what was learned for the plans stands in it if anything was."""
    learned = any(row[name] is not None for row in rows for name in LEARNED)
    return grid(
        caption,
        rows,
        " ".join([columns, *LEARNED]) if learned else columns,
        files=["comparisons.parquet", *(["cells.parquet"] if learned else [])],
        most=most,
        against_value="other",
    )


def _plans(manifest: CampaignManifest) -> Section:
    charts = []
    for number, model in enumerate(str(item["name"]) for item in manifest.models):
        own = [plan for plan in manifest.plans if plan["model"] == model]
        # Modes do not show what learned parts do.
        strips = [
            (f"{plan['name']} ({parts})" if (parts := parts_of_plan(plan)) else str(plan["name"]), plan["modes"])
            for plan in own[:MOST_STRIPS]
        ]
        if own:
            charts.append(plan_strips(strips, key=f"plans-{number}", of=model))
    rows = [
        {**plan, "kind": kind_of_plan(plan), "learned_parts": parts_of_plan(plan), "digest": plan["digest"][:12]}
        for plan in manifest.plans
    ]
    columns = "model name kind same_as learned_parts digest"
    table = grid("Plans", rows, columns, most=MOST_ROWS, name="plan", same_as="same plan as")
    return Section(title="Plans", charts=charts, grids=[table])


def _errors(campaign: CampaignData) -> Section:
    failed = _failed(campaign.cells)
    if not failed and not campaign.answered.failures:
        running = campaign.manifest.state is State.RUNNING
        said = "None is known yet." if running else "Every sample of every cell was answered."
        return Section(title="Errors", text=[said])
    counts: Counter[str] = Counter()
    for failure in campaign.answered.failures:
        counts[failure["reason"]] += failure["samples"]
    reasons = [{"reason": reason, "samples": samples} for reason, samples in counts.most_common()]
    columns, files = "model plan task state errors n message", ["cells.parquet"]
    grids = [
        grid("Errors by reason", reasons, "reason samples", most=MOST_ROWS),
        grid("Errors by cell", campaign.answered.failures, "model plan task reason samples", most=MOST_ROWS),
        grid("Cells that failed or lack samples", failed, columns, files=files, most=MOST_ROWS),
    ]
    return Section(title="Errors", grids=grids)


def _ran(manifest: CampaignManifest) -> Section:
    def shortened(rows: Sequence[Row]) -> list[Row]:
        digests = ("digest", "config_digest")
        return [{**row, **{name: row[name][:12] for name in digests if row.get(name)}} for row in rows]

    limit = manifest.arguments.get("limit")
    facts: list[Fact] = [("limit per task", "all samples" if limit is None else f"{limit:g}")]
    models = grid("Models", shortened(manifest.models), "name revision digest config_digest", name="model")
    tasks = grid("Tasks", shortened(manifest.tasks), "name num_docs main_metric digest", name="task")
    return ran(manifest, facts, models, tasks)


def pareto_front(points: Sequence[Row]) -> list[Row]:
    """Return the plans that no other beats in both FLOPs and the metric, from few FLOPs to many."""
    front: list[Row] = []
    # Plans of one size differ in the last digits of their FLOPs only.
    for point in sorted(points, key=lambda point: (round(point["flops_ratio"], 6), -point["value"])):
        if not front or point["value"] > front[-1]["value"]:
            front.append(point)
    return front


def accuracy_chart(group: Group, key: int) -> Chart | None:
    """Draw the main metric against the FLOPs ratio, with 95 % intervals and the Pareto front."""
    known = _known(group, "value")
    if not known:
        return None
    rows = _side_by_side(_judged_last(known))
    by_plan = {row["plan"]: row for row in rows}
    front = {point["plan"]: by_plan[point["plan"]] for point in pareto_front(known)}
    x = alt.X("place:Q", title="FLOPs ratio of the prefill", axis=alt.Axis(format=".0%", tickCount=12))
    x = x.scale(zero=False, nice=False, padding=25)
    y: dict[str, Any] = {"scale": alt.Scale(zero=False, nice=False, padding=15), "title": group.metric}
    kinds = {row["kind"] for row in rows}
    base = data().encode(x, colour_of("kind", kinds))
    bars, points = intervals(base, "y", "value", ("low", "high"), bar={"opacity": 0.6}, size=90, **y)
    said = tips("plan", flops_ratio=".1%", value=".4f", low=".4f", high=".4f")
    points = points.encode(shape_of("kind", kinds), tooltip=said).properties(name="points")
    step = _dashed("front", interpolate="step-after", strokeWidth=1.2).encode(x, alt.Y("value:Q", **y))
    shares = [f"{plan} ({row['flops_ratio']:.0%}, {row['value']:.3f})" for plan, row in front.items()]
    return Chart(
        key=f"accuracy-{key}",
        title=f"{group.metric} against FLOPs, {group.model} on {group.task}",
        note=f"{interval_note(row['interval_by'] for row in rows)} Dashed: the Pareto front, plans that no other beats "
        "in both (higher is better), named where there is room. Plans of the same FLOPs stand side by side.",
        description=f"{group.metric} of {len(rows)} plans of {group.model} on {group.task} against their FLOPs ratio. "
        f"Pareto front: {', '.join(shares)}.",
        marks=alt.layer(step, bars, points, names(x, alt.Y("value:Q", **y))),
        height=_HEIGHT,
        data={"rows": rows, "front": list(front.values())[::-1]},
        numbers=grid(
            f"Plans of {group.model} on {group.task}",
            [{**point, "on_the_front": point["plan"] in front} for point in group.points],
            "plan kind flops_ratio value low high n errors on_the_front",
            files=["cells.parquet", "metrics.parquet"],
            value=group.metric or "score",
        ),
    )


def _known(group: Group, name: str) -> list[Row]:
    """Return the points that a chart of this column against FLOPs has."""
    return [point for point in group.points if point["flops_ratio"] is not None and point[name] is not None]


def _judged_last(points: Sequence[Row]) -> list[Row]:
    """Sort points so that the plans that the campaign judges are drawn last, on top of the others."""
    return sorted(points, key=lambda point: -KINDS.index(point["kind"]))


def _dashed(name: str, **style: Any) -> Any:
    return data(name).mark_line(strokeDash=[5, 4], color="#888888", **style)


def _side_by_side(points: Sequence[Row]) -> list[Row]:
    """Give each point its `place` on the axis of FLOPs; those that would lie on each other are moved apart a little."""
    ratios = [round(point["flops_ratio"], 6) for point in points]
    step = _STEP * ((max(ratios) - min(ratios)) or 1.0)
    return [
        {**point, "place": ratio + step * (ratios[:number].count(ratio) - (ratios.count(ratio) - 1) / 2)}
        for number, (point, ratio) in enumerate(zip(points, ratios, strict=True))
    ]


def difference_chart(group: Group, key: int) -> Chart | None:
    """Draw the differences of the main metric to the full model and to random controls, with paired intervals."""
    rows = [row for row in group.comparisons if (row["metric"], row["subset"]) == (group.metric, "all")]
    if not rows:
        return None
    against = list(dict.fromkeys(row["against"] for row in rows))
    legend = alt.Legend(title="against", orient="top")
    base = data().encode(
        alt.Y("plan:N", sort=None, title=None, axis=alt.Axis(labelLimit=200)),
        alt.YOffset("against:N"),
        alt.Color("against:N", scale=alt.Scale(domain=against), legend=legend),
    )
    bars, points = intervals(
        base, "x", "difference", ("ci_low", "ci_high"), bar={"strokeWidth": 2}, title=f"difference of {group.metric}"
    )
    said = tips("plan against", difference="+.4f", ci_low="+.4f", ci_high="+.4f")
    return Chart(
        key=f"difference-{key}",
        title=f"Differences of {group.metric}, {group.model} on {group.task}",
        note="A plan less the full model, or less the mean of its random controls, on the samples that both have.",
        description=f"Differences of {group.metric} with paired 95 % intervals, {group.model} on {group.task}.",
        marks=alt.layer(zero_line("difference"), bars, points.encode(tooltip=said)),
        height=max(80, 22 * len({row["plan"] for row in rows})),
        data={"rows": rows, "zero": [{"difference": 0.0}]},
        numbers=_differences(
            f"Differences of {group.metric}",
            rows,
            "plan against difference ci_low ci_high p_value p_holm n share_changed",
        ),
        half=True,
    )


def speed_chart(group: Group, key: int) -> Chart | None:
    """Draw the measured prefill time against the FLOPs of the prefill, both as shares of the full model's."""
    known = _known(group, "prefill_ratio")
    if not known:
        return None
    rows = _side_by_side(_judged_last(known))
    least = min(min(row["flops_ratio"], row["prefill_ratio"], 1.0) for row in rows)
    axis = alt.Axis(format=".0%")
    x = alt.X("place:Q", title="FLOPs ratio of the prefill", axis=axis, scale=alt.Scale(zero=False, padding=15))
    y: dict[str, Any] = {"title": "measured prefill time ratio", "axis": axis}
    y["scale"] = alt.Scale(zero=False, padding=15)
    kinds = {row["kind"] for row in rows}
    base = data().encode(x, colour_of("kind", kinds))
    bars, points = intervals(
        base, "y", "prefill_ratio", ("ratio_low", "ratio_high"), bar={"opacity": 0.6}, size=90, **y
    )
    said = tips("plan", flops_ratio=".1%", prefill_ratio=".1%", ratio_low=".1%", ratio_high=".1%")
    points = points.encode(shape_of("kind", kinds), tooltip=said)
    line = _dashed("line").encode(x, alt.Y("prefill_ratio:Q", **y))
    return Chart(
        key=f"speed-{key}",
        title=f"Speed against FLOPs, {group.model} on {group.task}",
        note="Prefill time of the language model over the full model's, measured in turn on the same batch, with 95 % "
        f"intervals. Dashed: time falls as the FLOPs do; below it is faster.{_speed_note(rows[0])}",
        description=f"Prefill time of {len(rows)} plans of {group.model} on {group.task} against their FLOPs.",
        marks=alt.layer(line, bars, points),
        height=260,
        data={"rows": rows, "line": [{"place": end, "prefill_ratio": end} for end in (least, 1.0)]},
        numbers=grid(
            f"Speed of {group.model} on {group.task}",
            group.points,
            "plan kind flops_ratio prefill_ratio ratio_low ratio_high",
            files=["speed.parquet"],
            ratio_low="95 % from",
            ratio_high="to",
        ),
        half=True,
    )


def _speed_note(point: Row) -> str:
    """Return how the speed was measured, and how busy the replicas were with the task."""
    batch = "" if point["batch"] is None else f" A batch has {point['batch']} documents."
    idle = point["idle_share"]
    return batch if idle is None else f"{batch} While the task was answered, replicas waited {idle:.0%} of the time."


def exit_charts(exits: Sequence[Row], files: Sequence[str] = ()) -> list[Chart]:
    """Draw a heat map for each model and task: a line per plan and kind of question, a column per layer.

    `files` have the answers that were counted.
    """
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in exits:
        groups[row["model"], row["task"]].append({**row, "line": f"{row['plan']}, {row['kind']}"})
    return [_exit_chart(*names, rows, files, number) for number, (names, rows) in enumerate(groups.items())]


def _exit_chart(model: str, task: str, rows: Sequence[Row], files: Sequence[str], key: int) -> Chart:
    marks = (
        data()
        .mark_rect()
        .encode(
            layer_bands("layer_left", "exit after layer").scale(round=True),
            line_axis("line", 220),
            alt.Color("share:Q", legend=alt.Legend(title="share", format=".0%", orient="right")),
            tooltip=tips("plan kind layer_left", exits="d", share=".1%"),
        )
    )
    return Chart(
        key=f"exits-{key}",
        title=f"Exit layers, {model} on {task}",
        note="Share of the questions of a kind whose visual tokens left after a layer; prompts without an image do not "
        "count.",
        description=f"Heat map of exit layers by plan and kind of question, {model} on {task}.",
        marks=marks,
        height=max(80, 22 * len({row["line"] for row in rows})),
        data={"rows": rows},
        numbers=grid(
            f"Exit layers of {model} on {task}",
            [row for row in rows if row["exits"]],
            "plan kind samples layer_left exits share",
            files=files,
            most=MOST_ROWS,
        ),
    )
