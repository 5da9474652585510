"""The chart of measured speed against FLOPs of one model and task of a campaign."""

import altair as alt

from reports.page.campaign_data import KINDS, Group
from reports.page.document import Chart, Grid
from reports.page.kinds import kind_colour, kind_shape, tips
from reports.page.marks import ROWS, spec_of


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
