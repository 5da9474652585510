"""The charts of exit layers: which share of the questions of a kind lost its visual tokens after which layer."""

from collections.abc import Iterable, Sequence

import altair as alt

from reports.page.answers import answers_of
from reports.page.document import Chart, Value, shortened
from reports.page.exit_data import Exits
from reports.page.marks import ROWS, spec_of

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
