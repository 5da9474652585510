"""The page of a campaign folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reports.manifest import CampaignManifest, State
from reports.page.campaign_charts import accuracy_chart, difference_chart, exit_charts, speed_chart
from reports.page.campaign_data import CampaignData, Training, interval_of, kind_of_plan, parts_of_plan
from reports.page.document import Chart, Fact, Grid, Page, Section, Value, shortened
from reports.page.ran import command_of, run_facts, state_warnings
from reports.page.sweep_charts import plan_strips

# Nobody looks at strips of more plans of one model.
MOST_STRIPS = 60
_INTERVAL = ("difference", "95 % from", "to")


def campaign_page(data: CampaignData, *, links: str | None, compared: Sequence[Section] = ()) -> Page:
    """Lay out the page of a campaign; `compared` are the sections that compare it with another."""
    manifest = data.manifest
    unfinished = [] if data.cells else ["No cell has finished yet."]
    tasks = ", ".join(str(task["name"]) for task in manifest.tasks)
    return Page(
        title=f"Campaign: {', '.join(str(model['name']) for model in manifest.models)} on {tasks}",
        kind="campaign",
        state=str(manifest.state),
        warnings=[*state_warnings(manifest, "samples or cells"), *unfinished, *data.problems],
        headline=_headline(data),
        sections=[*compared, *_results(data), *_plans(manifest), _errors(data), _ran(manifest)],
        links=links,
    )


def _headline(data: CampaignData) -> list[Fact]:
    counts, manifest = data.manifest.counts, data.manifest
    running = manifest.state is State.RUNNING
    cells = len({row["cell"] for row in data.cells})
    return [
        ("models", len(manifest.models)),
        ("plans", len(manifest.plans)),
        ("tasks", len(manifest.tasks)),
        ("cells finished", cells if running else counts.get("cells")),
        ("cells failed or partial", sum(row["state"] != "complete" for row in data.cells if row["same_as"] is None)),
        ("samples", sum(row["n"] for row in data.cells) if running else counts.get("samples")),
        ("samples with errors", sum(row["errors"] for row in data.cells) if running else counts.get("errors")),
    ]


def _results(data: CampaignData) -> list[Section]:
    groups = list(enumerate(data.groups()))
    accuracy = [chart for index, group in groups if (chart := accuracy_chart(group, str(index)))]
    sections = [Section(title="Accuracy against FLOPs", charts=accuracy)] if accuracy else []
    pairs: list[Chart] = []
    for index, group in groups:
        pairs += [chart for draw in (difference_chart, speed_chart) if (chart := draw(group, str(index)))]
    if pairs:
        sections.append(Section(title="Differences and speed", charts=pairs))
    if data.exits:
        sections.append(Section(title="Exit layers", charts=exit_charts(data.exits)))
    if data.comparisons:
        sections.append(Section(title="All differences", grids=[_differences(data)]))
    if data.metrics:
        sections.append(Section(title="All metrics", grids=[_metrics(data)]))
    return sections


def _differences(data: CampaignData) -> Grid:
    names = ("model", "task", "metric", "plan", "against", "value", "against_value", "difference", "ci_low", "ci_high")
    training = Training(data.cells)
    return shortened(
        [[*(row[name] for name in (*names, "n", "share_changed")), *training.values(row)] for row in data.comparisons],
        caption="Every metric of every plan against the full model and its random controls",
        columns=(
            "model",
            "task",
            "metric",
            "plan",
            "against",
            "value",
            "other",
            *_INTERVAL,
            "samples",
            "answers changed",
            *training.columns,
        ),
        files=["comparisons.parquet", *(["cells.parquet"] if training.columns else [])],
    )


def _metrics(data: CampaignData) -> Grid:
    names = ("model", "task", "plan", "metric", "filter", "value")
    return shortened(
        [[*(row[name] for name in names), *(interval_of(row) or (None,) * 3), row["n"]] for row in data.metrics],
        caption="Every metric of every cell, kinds of documents included",
        columns=(*names, "95 % from", "to", "interval by", "documents"),
        files=["metrics.parquet"],
    )


def _plans(manifest: CampaignManifest) -> list[Section]:
    charts = []
    for index, model in enumerate(str(item["name"]) for item in manifest.models):
        own = [plan for plan in manifest.plans if plan["model"] == model]
        if own:
            strips = [(_labelled(plan), plan["modes"]) for plan in own[:MOST_STRIPS]]
            charts.append(plan_strips(strips, key=f"plans-{index}", of=model))
    rows: list[list[Value]] = [
        [
            *(plan["model"], plan["name"], kind_of_plan(plan)),
            *(plan.get("same_as"), parts_of_plan(plan), plan["digest"][:12]),
        ]
        for plan in manifest.plans
    ]
    columns = ("model", "plan", "kind", "same plan as", "learned parts", "digest")
    return [Section(title="Plans", charts=charts, grids=[shortened(rows, caption="Plans", columns=columns)])]


def _labelled(plan: Mapping[str, Any]) -> str:
    """The plan's name; modes do not show what its learned parts do."""
    parts = parts_of_plan(plan)
    return f"{plan['name']} ({parts})" if parts else str(plan["name"])


def _errors(data: CampaignData) -> Section:
    failed = [row for row in data.cells if row["state"] != "complete" and row["same_as"] is None]
    if not failed and not data.failures:
        running = data.manifest.state is State.RUNNING
        return Section(
            title="Errors", text=["None is known yet." if running else "Every sample of every cell was answered."]
        )
    counts: Counter[str] = Counter()
    for failure in data.failures:
        counts[failure.reason] += failure.samples
    rows = [
        [row["model"], row["plan"], row["task"], row["state"], row["errors"], row["n"], _cut(row["message"])]
        for row in failed
    ]
    reasons: list[list[Value]] = [[reason, count] for reason, count in counts.most_common()]
    return Section(
        title="Errors",
        grids=[
            shortened(reasons, caption="Errors by reason", columns=("reason", "samples")),
            shortened(
                [list(failure) for failure in data.failures],
                caption="Errors by cell",
                columns=("model", "plan", "task", "reason", "samples"),
            ),
            shortened(
                rows,
                caption="Cells that failed or lack samples",
                columns=("model", "plan", "task", "state", "errors", "samples", "message"),
                files=["cells.parquet"],
            ),
        ],
    )


def _ran(manifest: CampaignManifest) -> Section:
    models: list[list[Value]] = [
        [model["name"], model.get("revision"), _start(model.get("digest")), _start(model.get("config_digest"))]
        for model in manifest.models
    ]
    tasks = [
        [*(task.get(name) for name in ("name", "num_docs", "main_metric")), _start(task.get("digest"))]
        for task in manifest.tasks
    ]
    return Section(
        title="What ran",
        facts=[("limit per task", _limit(manifest.arguments.get("limit"))), *run_facts(manifest)],
        command=command_of(manifest),
        grids=[
            Grid(caption="Models", columns=("model", "revision", "digest", "architecture digest"), rows=models),
            Grid(caption="Tasks", columns=("task", "documents", "main metric", "digest"), rows=tasks),
        ],
    )


def _start(digest: str | None) -> str | None:
    return digest and digest[:12]


def _limit(value: Any) -> Value:
    return "all samples" if value is None else f"{value:g}"


def _cut(text: str | None) -> str | None:
    return text[:299] + "…" if text is not None and len(text) > 300 else text
