"""The page of a sweep folder."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.manifest import State, SweepManifest
from reports.page.document import Chart, Fact, Grid, Page, Section, Value, shortened
from reports.page.ran import command_of, run_facts, state_warnings
from reports.page.sweep_charts import heat_chart, lc_chart, plan_strips, rank_chart
from reports.page.sweep_data import SweepData
from reports.tables import by_mode, stability_line
from shortv.plan import Mode, Plan


def sweep_page(data: SweepData, *, links: str | None, compared: Sequence[Section] = ()) -> Page:
    """Lay out the page of a sweep; `compared` are the sections that compare it with another."""
    manifest = data.manifest
    unfinished = [] if data.layers else ["There are no results to draw yet."]
    parts = [*compared, *_measured(data), _plans(data), _samples(data), _errors(data), _ran(manifest)]
    return Page(
        title=f"Layer Contribution of {manifest.model}",
        kind="sweep",
        state=str(manifest.state),
        warnings=state_warnings(manifest, "samples") + unfinished,
        headline=_headline(data),
        sections=[part for part in parts if part is not None],
        links=links,
    )


def _headline(data: SweepData) -> list[Fact]:
    manifest, counts = data.manifest, data.manifest.counts
    known = manifest.state is not State.RUNNING
    return [
        ("model", manifest.model),
        ("decoder layers", manifest.num_layers),
        ("samples used", counts.get("used") if known else "not known yet"),
        ("samples with errors", counts.get("errors") if known else "not known yet"),
        ("noise floor", None if manifest.noise_floor is None else f"{manifest.noise_floor:.2e} nats"),
        ("KL direction", manifest.kl_direction),
    ]


def _measured(data: SweepData) -> list[Section]:
    if not data.layers:
        return []
    floor = data.manifest.noise_floor
    changed = {
        (mode, layer): float(found.changed_L[layer] / found.counted_L[layer])
        for mode, found in data.measured.items()
        for layer in range(len(found.counted_L))
        if found.counted_L[layer]
    }
    groups = by_mode(data.layers)
    sections = [
        Section(title="Layer Contribution", charts=[lc_chart(data.layers, noise_floor=floor, changed=changed)]),
        Section(
            title="Ranking",
            text=[stability_line(mode, shares) for mode, shares in (data.manifest.stability or {}).items()],
            charts=[rank_chart(mode, rows) for mode, rows in groups.items()],
        ),
    ]
    heats = _heats(data)
    return [*sections, Section(title="Samples and layers", charts=heats)] if heats else sections


def _heats(data: SweepData) -> list[Chart]:
    total = len(data.samples) if len(data.samples) > len(data.sample_ids) else None
    return [
        heat_chart(
            mode,
            found.kl_SL,
            data.sample_ids,
            noise_floor=data.manifest.noise_floor,
            files=data.parts,
            total=total,
        )
        for mode, found in data.measured.items()
        if not np.isnan(found.kl_SL).all()
    ]


def _plans(data: SweepData) -> Section | None:
    if not data.plans:
        return None
    names = {file: _plan_name(file, plan) for file, plan in data.plans.items()}
    strips = plan_strips(
        [(names[file], [str(mode) for mode in plan.modes]) for file, plan in data.plans.items()],
        of=data.manifest.model,
        files=list(data.plans),
    )
    rows: list[list[Value]] = [
        [names[file], _count(plan), plan.flops_ratio, plan.flops_t, plan.flops_v, plan.digest[:12]]
        for file, plan in data.plans.items()
    ]
    columns = ("plan", "layers changed", "FLOPs ratio", "at text tokens", "and visual tokens", "digest")
    return Section(
        title="Plans", charts=[strips], grids=[Grid(caption="Plans of this sweep", columns=columns, rows=rows)]
    )


def _plan_name(file: str, plan: Plan) -> str:
    """The plan's name; where its file is called otherwise there may be two of that name."""
    stem = file.removeprefix("plans/").removesuffix(".json")
    return plan.name if stem == plan.name else f"{plan.name} ({stem})"


def _count(plan: Plan) -> int:
    return sum(mode is not Mode.FULL for mode in plan.modes)


def _samples(data: SweepData) -> Section | None:
    if not len(data.samples):
        return None
    names = ("sample_id", "dataset", "prompt", "answer", "n_text", "n_visual")
    first = [[row[name] for name in names] for row in data.samples.slice(0, 500).to_pylist()]
    grid = Grid(
        caption="Calibration samples that were used",
        columns=("sample", "data set", "prompt", "answer", "text tokens", "visual tokens"),
        rows=[[_cut(value) for value in row] for row in first],
        total=len(data.samples) if len(data.samples) > len(first) else None,
        files=["samples.parquet"],
    )
    return Section(title="Samples used", grids=[_datasets(data.samples), grid])


def _datasets(samples: pa.Table) -> Grid:
    names = samples["dataset"]
    rows: list[list[Value]] = []
    for name in pc.unique(names).to_pylist():
        own = samples.filter(pc.is_null(names) if name is None else pc.equal(names, name))
        text, visual = own["n_text"], own["n_visual"]
        means = [pc.mean(text).as_py(), pc.mean(visual).as_py()]
        without = pc.sum(pc.equal(visual, 0)).as_py()
        rows.append(
            [name or "unknown", len(own), without, means[0], means[1], pc.min(visual).as_py(), pc.max(visual).as_py()]
        )
    columns = ("data set", "samples", "without image", "text tokens", "visual tokens", "least visual", "most visual")
    return Grid(caption="Samples by data set; mean token counts", columns=columns, rows=rows)


def _errors(data: SweepData) -> Section:
    if not len(data.errors):
        known = data.manifest.state is not State.RUNNING
        return Section(title="Errors", text=["Every sample could be used." if known else "None is known yet."])
    rows: list[dict[str, Any]] = data.errors.to_pylist()
    counts = Counter((row["stage"], row["error"]) for row in rows)
    example = {(row["stage"], row["error"]): row["message"] for row in reversed(rows)}
    reasons = [[stage, error, count, _cut(example[stage, error])] for (stage, error), count in counts.most_common()]
    listed = [[row["sample_id"], row["stage"], row["error"], _cut(row["message"])] for row in rows]
    return Section(
        title="Errors",
        grids=[
            Grid(caption="Errors by reason", columns=("stage", "error", "samples", "for example"), rows=reasons),
            shortened(
                listed,
                caption="Samples that could not be used",
                columns=("sample", "stage", "error", "message"),
                files=["errors.parquet"],
            ),
        ],
    )


def _ran(manifest: SweepManifest) -> Section:
    facts: list[Fact] = [
        ("model", manifest.model),
        ("revision", manifest.revision or "none"),
        ("architecture digest", manifest.config_digest),
        ("calibration digest", manifest.calibration_digest),
        ("calibration samples", len(manifest.calibration_ids)),
        ("arguments digest", manifest.arguments_digest),
        ("device", _cut(str(manifest.details.get("device", "unknown")))),
        *run_facts(manifest),
    ]
    return Section(title="What ran", facts=facts, command=command_of(manifest))


def _cut(value: Value) -> Value:
    return value[:300] + "…" if isinstance(value, str) and len(value) > 300 else value
