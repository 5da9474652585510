"""The charts of one model and task of a campaign: accuracy against FLOPs, and differences."""

from collections.abc import Sequence
from typing import Any, Final

import altair as alt

from reports.page.campaign_data import KINDS, Group, Point
from reports.page.document import Chart, Grid
from reports.page.intervals import interval_note
from reports.page.kinds import kind_colour, kind_shape, tips
from reports.page.labels import PADDING, label_layer, label_rows
from reports.page.marks import ROWS, spec_of

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
