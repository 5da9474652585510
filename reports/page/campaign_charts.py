"""The charts of a campaign: accuracy and speed against FLOPs, differences, and exit layers."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import altair as alt

from reports.page.answers import Exits, answers_of
from reports.page.campaign_data import KINDS, Group, Point, interval_note
from reports.page.charts import PADDING, ROWS, kind_colour, kind_shape, label_layer, label_rows, spec_of, tips
from reports.page.document import Chart, Grid, Value, shortened

# Between two plans of the same FLOPs, as a share of the axis.
_STEP: Final = 0.008
_HEIGHT: Final = 340
_FRONT: Final = alt.NamedData(name="front")


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the plans that no other beats in both FLOPs and the metric, from few FLOPs to many."""
    known = [point for point in points if point.flops_ratio is not None and point.value is not None]
    front: list[Point] = []
    # Plans of one size differ in the last digits of their FLOPs only.
    for point in sorted(known, key=lambda point: (round(point.flops_ratio or 0.0, 6), -(point.value or 0.0))):
        if not front or (point.value or 0.0) > (front[-1].value or 0.0):
            front.append(point)
    return front


def accuracy_chart(group: Group, key: str) -> Chart | None:
    """Draw the main metric against the FLOPs ratio, with 95 % intervals and the Pareto front."""
    known = [point for point in group.points if point.flops_ratio is not None and point.value is not None]
    if not known:
        return None
    front = pareto_front(known)
    placed = _side_by_side(known)
    places = {point.plan: place for point, place in placed}
    rows = [
        {"plan": point.plan, "kind": point.kind, "flops": point.flops_ratio, "place": place, "value": point.value}
        | dict(zip(("low", "high"), _ends(point), strict=True))
        for point, place in placed
    ]
    description = (
        f"{group.metric} of {len(known)} plans of {group.model} on {group.task} against their FLOPs ratio. "
        f"Pareto front: {', '.join(f'{point.plan} ({point.flops_ratio:.0%}, {point.value:.3f})' for point in front)}."
    )
    intervals = interval_note(point.interval.method for point in known if point.interval)
    return Chart(
        key=f"accuracy-{key}",
        title=f"{group.metric} against FLOPs, {group.model} on {group.task}",
        note=f"{intervals} Dashed: the Pareto front, plans that no other beats in both (higher is better), named where "
        "there is room. Plans of the same FLOPs stand side by side.",
        description=description,
        spec=spec_of(_accuracy_layers(group, {point.kind for point in known}), height=_HEIGHT, description=description),
        data={
            "rows": rows,
            "front": [{"place": places[point.plan], "value": point.value} for point in front],
            "labels": label_rows(rows, [point.plan for point in reversed(front)], height=_HEIGHT),
        },
        numbers=_accuracy_numbers(group, front),
    )


def _accuracy_layers(group: Group, kinds: set[str]) -> Any:
    axis = alt.Axis(format=".0%", tickCount=12)
    x = alt.X("place:Q", title="FLOPs ratio of the prefill", axis=axis).scale(zero=False, nice=False, padding=PADDING.x)
    scale = alt.Scale(zero=False, nice=False, padding=PADDING.y)
    base = alt.Chart(ROWS).encode(x, kind_colour(kinds))
    bars = base.mark_rule(opacity=0.6).encode(alt.Y("low:Q", scale=scale, title=group.metric), alt.Y2("high"))
    points = base.mark_point(filled=True, size=90, opacity=0.9).encode(
        alt.Y("value:Q", scale=scale),
        kind_shape(kinds),
        tooltip=tips(("flops", ".1%"), ("value", ".4f"), ("low", ".4f"), ("high", ".4f")),
    )
    front = (
        alt.Chart(_FRONT)
        .mark_line(interpolate="step-after", strokeDash=[5, 4], strokeWidth=1.2, color="#888888")
        .encode(x, alt.Y("value:Q", scale=scale))
    )
    return alt.layer(front, bars, points, label_layer(x, alt.Y("value:Q", scale=scale)))


def _side_by_side(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Give each point its place on the axis of FLOPs; those that would lie on each other are moved apart a little."""
    ratios = [round(point.flops_ratio or 0.0, 6) for point in points]
    step = _STEP * ((max(ratios) - min(ratios)) or 1.0)
    placed: list[tuple[Point, float]] = []
    # What is drawn last lies on top: the plans that the campaign judges.
    for point in sorted(points, key=lambda point: -KINDS.index(point.kind)):
        ratio = round(point.flops_ratio or 0.0, 6)
        before = sum(round(other.flops_ratio or 0.0, 6) == ratio for other, _ in placed)
        middle = (ratios.count(ratio) - 1) / 2
        placed.append((point, ratio + step * (before - middle)))
    return placed


def _accuracy_numbers(group: Group, front: Sequence[Point]) -> Grid:
    rows = [
        [
            point.plan,
            point.kind,
            point.flops_ratio,
            point.value,
            *_ends(point),
            point.n,
            point.errors,
            point in front,
        ]
        for point in group.points
    ]
    columns = (
        "plan",
        "kind",
        "FLOPs ratio",
        group.metric or "score",
        "95 % from",
        "to",
        "samples",
        "errors",
        "on the front",
    )
    files = ["cells.parquet", "metrics.parquet"]
    return Grid(caption=f"Plans of {group.model} on {group.task}", columns=columns, rows=rows, files=files)


def difference_chart(group: Group, key: str) -> Chart | None:
    """Draw the differences of the main metric to the full model and to random controls, with paired intervals."""
    chosen = [row for row in group.comparisons if row["metric"] == group.metric]
    if not chosen:
        return None
    names = ("plan", "against", "difference", "ci_low", "ci_high", "n", "share_changed")
    rows = [{name: row[name] for name in names} for row in chosen]
    description = f"Differences of {group.metric} with paired 95 % intervals, {group.model} on {group.task}."
    against = list(dict.fromkeys(row["against"] for row in rows))
    y = alt.Y("plan:N", sort=None, title=None, axis=alt.Axis(labelLimit=200))
    colour = alt.Color("against:N", scale=alt.Scale(domain=against), legend=alt.Legend(title="against", orient="top"))
    base = alt.Chart(ROWS).encode(y, alt.YOffset("against:N"), colour)
    bars = base.mark_rule(strokeWidth=2).encode(
        alt.X("ci_low:Q", title=f"difference of {group.metric}"), alt.X2("ci_high")
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        alt.X("difference:Q"),
        tooltip=tips(("against", None), ("difference", "+.4f"), ("ci_low", "+.4f"), ("ci_high", "+.4f")),
    )
    zero = alt.Chart(alt.NamedData(name="zero")).mark_rule(strokeDash=[3, 3]).encode(alt.X("difference:Q"))
    height = max(80, 22 * len({row["plan"] for row in rows}))
    return Chart(
        key=f"difference-{key}",
        title=f"Differences of {group.metric}, {group.model} on {group.task}",
        note="A plan less the full model, or less the mean of its random controls, on the samples that both have.",
        description=description,
        spec=spec_of(alt.layer(zero, bars, points), height=height, description=description),
        data={"rows": rows, "zero": [{"difference": 0.0}]},
        numbers=Grid(
            caption=f"Differences of {group.metric}",
            columns=(
                *("plan", "against", "difference", "95 % from", "to", "samples", "answers changed"),
                *group.training.columns,
            ),
            rows=[[*(row[name] for name in names), *group.training.values(row)] for row in chosen],
            files=["comparisons.parquet", *(["cells.parquet"] if group.training.columns else [])],
        ),
        half=True,
    )


def _ends(point: Point) -> tuple[float | None, float | None]:
    return (None, None) if point.interval is None else point.interval[:2]


def speed_chart(group: Group, key: str) -> Chart | None:
    """Draw the measured prefill time against the FLOPs of the prefill, both as shares of the full model's."""
    known = [point for point in group.points if point.flops_ratio is not None and point.prefill_ratio is not None]
    rows = [
        {"plan": point.plan, "kind": point.kind, "flops": point.flops_ratio, "measured": point.prefill_ratio}
        for point in sorted(known, key=lambda point: -KINDS.index(point.kind))
    ]
    description = f"Prefill time of {len(rows)} plans of {group.model} on {group.task} against their FLOPs."
    if not rows:
        return None
    least = min(min(point.flops_ratio or 1.0, point.prefill_ratio or 1.0) for point in known)
    line = [{"flops": end, "measured": end} for end in (least, 1.0)]
    x = alt.X("flops:Q", title="FLOPs ratio of the prefill", axis=alt.Axis(format=".0%")).scale(zero=False, padding=15)
    y = alt.Y("measured:Q", title="measured prefill time ratio", axis=alt.Axis(format=".0%")).scale(
        zero=False, padding=15
    )
    points = (
        alt.Chart(ROWS)
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(
            x,
            y,
            kind_colour({point.kind for point in known}),
            kind_shape({point.kind for point in known}),
            tooltip=tips(("flops", ".1%"), ("measured", ".1%")),
        )
    )
    predicted = alt.Chart(alt.NamedData(name="line")).mark_line(strokeDash=[5, 4], color="#888888").encode(x, y)
    return Chart(
        key=f"speed-{key}",
        title=f"Speed against FLOPs, {group.model} on {group.task}",
        note="Median prefill time over the full model's. Dashed: time falls as the FLOPs do; below it is faster.",
        description=description,
        spec=spec_of(alt.layer(predicted, points), height=260, description=description),
        data={"rows": rows, "line": line},
        numbers=Grid(
            caption=f"Speed of {group.model} on {group.task}",
            columns=("plan", "kind", "FLOPs ratio", "prefill ratio", "prefill ms", "latency ms", "samples/s"),
            rows=[
                [p.plan, p.kind, p.flops_ratio, p.prefill_ratio, p.prefill_ms, p.latency_ms, p.samples_per_second]
                for p in group.points
            ],
            files=["speed.parquet"],
        ),
        half=True,
    )


NEVER = "never"
_COLUMNS = ("plan", "kind", "samples", "exit after layer", "exits", "share")


def exit_charts(exits: Sequence[Exits]) -> list[Chart]:
    """Draw a heat map for each model and task: a line per plan and kind of question, a column per layer."""
    groups: dict[tuple[str, str], list[Exits]] = {}
    for one in exits:
        groups.setdefault((one.model, one.task), []).append(one)
    return [_chart(model, task, found, str(index)) for index, ((model, task), found) in enumerate(groups.items())]


def _chart(model: str, task: str, exits: Sequence[Exits], key: str) -> Chart:
    lines = {f"{one.plan}, {one.kind}": one for one in exits}
    rows: list[dict[str, Value]] = [
        {"line": line, "layer": layer, "exits": count, "share": count / one.samples}
        for line, one in lines.items()
        for layer, count in _by_layer(one)
    ]
    num_layers = max(one.num_layers for one in exits)
    description = f"Heat map of exit layers by plan and kind of question, {model} on {task}."
    numbers: list[list[Value]] = [
        [one.plan, one.kind, one.samples, layer, count, count / one.samples]
        for one in exits
        for layer, count in _by_layer(one)
        if count
    ]
    return Chart(
        key=f"exits-{key}",
        title=f"Exit layers, {model} on {task}",
        note="Share of the questions of a kind whose visual tokens left after a layer; prompts without an image do not "
        "count.",
        description=description,
        spec=_spec(list(lines), [*map(str, range(num_layers)), NEVER], description),
        data={"rows": rows},
        numbers=shortened(
            numbers,
            caption=f"Exit layers of {model} on {task}",
            columns=_COLUMNS,
            files=[answers_of(cell) for cell in dict.fromkeys(one.cell for one in exits)],
        ),
    )


def _by_layer(one: Exits) -> Iterable[tuple[str, int]]:
    """Every layer and never, with how many samples left there."""
    names = [*map(str, range(one.num_layers)), NEVER]
    return [(name, one.counts.get(layer, 0)) for layer, name in enumerate(names)]


def _spec(lines: Sequence[str], layers: Sequence[str], description: str) -> dict[str, object]:
    axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)
    chart = (
        alt.Chart(ROWS)
        .mark_rect()
        .encode(
            alt.X("layer:O", title="exit after layer", sort=list(layers), axis=axis).scale(round=True),
            alt.Y("line:N", sort=list(lines), title=None, axis=alt.Axis(labelLimit=220, ticks=False, domain=False)),
            alt.Color("share:Q", legend=alt.Legend(title="share", format=".0%", orient="right")),
            tooltip=[
                alt.Tooltip("line:N", title="plan, kind"),
                alt.Tooltip("layer:O", title="exit after layer"),
                alt.Tooltip("exits:Q", format="d"),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )
    return spec_of(chart, height=max(80, 22 * len(lines)), description=description)
