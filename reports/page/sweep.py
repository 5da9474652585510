"""The page of a sweep folder: LC and rank of every layer, LC by sample and layer, plans, samples and errors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

import altair as alt
import numpy as np
import pyarrow.compute as pc

from reports.manifest import State, SweepManifest
from reports.page.charts import (
    colour_of,
    data,
    intervals,
    layer_axis,
    layer_bands,
    line_axis,
    log_bottom,
    shape_of,
    tips,
)
from reports.page.document import MOST_ROWS, Chart, Fact, Grid, Page, Row, Section, cut, grid
from reports.page.ran import ran, state_warnings
from reports.page.sweep_data import SweepData
from reports.tables import by_mode, stability_line
from shortv.plan import Mode, Plan


def sweep_page(sweep: SweepData) -> Page:
    """Lay out the page of a sweep."""
    manifest = sweep.manifest
    unfinished = [] if sweep.layers else ["There are no results to draw yet."]
    return Page(
        title=f"Layer Contribution of {manifest.model}",
        state=str(manifest.state),
        warnings=state_warnings(manifest, "samples") + unfinished,
        headline=_headline(manifest),
        sections=[*_layers(sweep), *_plans(sweep), *_samples(sweep), _errors(sweep), _ran(manifest)],
    )


def _headline(manifest: SweepManifest) -> list[Fact]:
    known = manifest.state is not State.RUNNING
    return [
        ("model", manifest.model),
        ("decoder layers", manifest.num_layers),
        ("samples used", manifest.counts.get("used") if known else "not known yet"),
        ("samples with errors", manifest.counts.get("errors") if known else "not known yet"),
        ("noise floor", None if manifest.noise_floor is None else f"{manifest.noise_floor:.2e} nats"),
        ("KL direction", manifest.kl_direction),
    ]


def _layers(sweep: SweepData) -> list[Section]:
    if not sweep.layers:
        return []
    stability = (sweep.manifest.stability or {}).items()
    ranks = [rank_chart(mode, rows) for mode, rows in by_mode(sweep.layers).items()]
    heats = [heat_chart(sweep, mode) for mode, found in sweep.measured.items() if not np.isnan(found.kl_SL).all()]
    sections = [
        Section(title="Layer Contribution", charts=[lc_chart(sweep)]),
        Section(title="Ranking", text=[stability_line(mode, shares) for mode, shares in stability], charts=ranks),
        Section(title="Samples and layers", charts=heats),
    ]
    return sections if heats else sections[:2]


def _plans(sweep: SweepData) -> list[Section]:
    if not sweep.plans:
        return []
    names = {file: _plan_name(file, plan) for file, plan in sweep.plans.items()}
    modes = [(names[file], [str(mode) for mode in plan.modes]) for file, plan in sweep.plans.items()]
    strips = plan_strips(modes, of=sweep.manifest.model, files=list(sweep.plans))
    rows = [
        {"plan": names[file], "layers_changed": _changed(plan.modes), "flops_ratio": plan.flops_ratio}
        | {"t": plan.flops_t, "v": plan.flops_v, "digest": plan.digest[:12]}
        for file, plan in sweep.plans.items()
    ]
    columns = "plan layers_changed flops_ratio t v digest"
    table = grid("Plans of this sweep", rows, columns, t="at text tokens", v="and visual tokens")
    return [Section(title="Plans", charts=[strips], grids=[table])]


def _plan_name(file: str, plan: Plan) -> str:
    """The plan's name; where its file is called otherwise there may be two of that name."""
    stem = file.removeprefix("plans/").removesuffix(".json")
    return plan.name if stem == plan.name else f"{plan.name} ({stem})"


def _changed(modes: Sequence[str]) -> int:
    return sum(mode != Mode.FULL for mode in modes)


def _samples(sweep: SweepData) -> list[Section]:
    samples = sweep.samples
    if not len(samples):
        return []
    counted = samples.append_column("imageless", pc.equal(samples["n_visual"], 0).cast("int64"))
    found = counted.group_by("dataset", use_threads=False).aggregate(
        [([], "count_all"), ("imageless", "sum"), ("n_text", "mean")]
        + [("n_visual", function) for function in ("mean", "min", "max")]
    )
    sets = grid(
        "Samples by data set; mean token counts",
        [{**row, "dataset": row["dataset"] or "unknown"} for row in found.to_pylist()],
        "dataset count_all imageless_sum n_text_mean n_visual_mean n_visual_min n_visual_max",
        imageless_sum="without image",
        n_text_mean="text tokens",
        n_visual_mean="visual tokens",
        n_visual_min="least visual",
        n_visual_max="most visual",
    )
    columns, files = "sample_id dataset prompt answer n_text n_visual", ["samples.parquet"]
    used = grid("Calibration samples that were used", samples, columns, files=files, most=MOST_ROWS)
    return [Section(title="Samples used", grids=[sets, used])]


def _errors(sweep: SweepData) -> Section:
    errors = sweep.errors
    if not len(errors):
        known = sweep.manifest.state is not State.RUNNING
        return Section(title="Errors", text=["Every sample could be used." if known else "None is known yet."])
    reasons = errors.group_by(["stage", "error"], use_threads=False).aggregate(
        [([], "count_all"), ("message", "first")]
    )
    grids = [
        grid(
            "Errors by reason",
            reasons.sort_by([("count_all", "descending")]),
            "stage error count_all message_first",
            message_first="for example",
        ),
        grid(
            "Samples that could not be used",
            errors,
            "sample_id stage error message",
            files=["errors.parquet"],
            most=MOST_ROWS,
        ),
    ]
    return Section(title="Errors", grids=grids)


def _ran(manifest: SweepManifest) -> Section:
    facts: list[Fact] = [
        ("model", manifest.model),
        ("revision", manifest.revision or "none"),
        ("architecture digest", manifest.config_digest),
        ("calibration digest", manifest.calibration_digest),
        ("calibration samples", len(manifest.calibration_ids)),
        ("arguments digest", manifest.arguments_digest),
        ("device", cut(str(manifest.details.get("device", "unknown")))),
    ]
    return ran(manifest, facts)


def lc_chart(sweep: SweepData) -> Chart:
    """Draw LC per layer: a line and a 95 % band per mode; zeros, which a log axis lacks, are hollow at its edge."""
    noise_floor = sweep.manifest.noise_floor or 0.0
    bottom = log_bottom((row["mean"] for row in sweep.layers), noise_floor)
    rows = [
        {**row, "hollow": row["mean"] <= noise_floor, "changed": _share_changed(sweep, row)}
        | {"low": max(row["ci_low"], bottom), "high": max(row["ci_high"], bottom), "y": max(row["mean"], bottom)}
        for row in sweep.layers
    ]
    note = f"Mean KL divergence ({sweep.manifest.kl_direction}) of the next-token distribution, with 95 % bootstrap "
    note += f"bands. Noise floor {noise_floor:.2e} nats." if noise_floor else "bands. No noise floor is known."
    if any(row["hollow"] for row in rows):
        at = "at or below the noise floor" if noise_floor else "zero"
        note += f" Hollow: {at}, drawn no lower than the axis reaches."
    extremes = " ".join(map(_extremes, by_mode(sweep.layers).values()))
    return Chart(
        key="lc",
        title="Layer Contribution per layer",
        note=note,
        description=f"Line chart of LC per decoder layer for {', '.join(sweep.modes)}. {extremes}",
        marks=_lc_marks(sweep.modes, bottom, noise_floor),
        height=340,
        data={"rows": rows, "floor": [{"floor": max(noise_floor, bottom)}]},
        numbers=grid(
            "LC and rank of every layer",
            rows,
            "mode layer rank mean ci_low ci_high rank_low rank_high n changed",
            files=["lc_layers.parquet"],
            changed="top token changed",
        ),
    )


def _share_changed(sweep: SweepData, row: Row) -> float | None:
    found = sweep.measured.get(row["mode"])
    counted = found.counted_L[row["layer"]] if found else 0
    return float(found.changed_L[row["layer"]] / counted) if found and counted else None


def _lc_marks(modes: Sequence[str], bottom: float, noise_floor: float) -> Any:
    scale = alt.Scale(type="log", domainMin=bottom, nice=False)
    axis = alt.Axis(format=".0e", tickCount=6)
    base = data().encode(layer_axis(), colour_of("mode", modes))
    band = base.mark_area(opacity=0.18, clip=True).encode(
        alt.Y("low:Q", scale=scale, title="LC (nats)", axis=axis), alt.Y2("high")
    )
    line = base.encode(alt.Y("y:Q", scale=scale))
    points = line.encode(
        shape_of("mode", modes), tooltip=tips("mode layer", mean=".3e", ci_low=".3e", ci_high=".3e", n="d")
    )
    filled = points.transform_filter("!datum.hollow").mark_point(filled=True, size=55, opacity=1)
    hollow = points.transform_filter("datum.hollow").mark_point(filled=False, size=80, strokeWidth=2, opacity=1)
    layers = [band, line.mark_line(clip=False), filled, hollow]
    if noise_floor:
        # A dashed line; of a floor below the axis, the name alone.
        inside = noise_floor >= bottom
        text = f"{'' if inside else 'below: '}noise floor {noise_floor:.1e}"
        floor = data("floor").encode(alt.Y("floor:Q", scale=scale))
        layers += [floor.mark_rule(strokeDash=[6, 4])] if inside else []
        layers.append(floor.mark_text(align="left", baseline="bottom", dx=4, dy=-3, text=text).encode(x=alt.value(0)))
    return alt.layer(*layers)


def _extremes(rows: Sequence[Row]) -> str:
    low, high = (choose(rows, key=lambda row: float(row["mean"])) for choose in (min, max))
    return (
        f"{low['mode']}: lowest {low['mean']:.2e} nats in layer {low['layer']}, "
        f"highest {high['mean']:.2e} in layer {high['layer']}."
    )


def rank_chart(mode: str, rows: Sequence[Row]) -> Chart:
    """Draw the rank of every layer of one mode with its 95 % interval, rank 1 on top."""
    ranked = sorted(rows, key=lambda row: int(row["rank"]))
    first = ", ".join(str(row["layer"]) for row in ranked[:5])
    marks = intervals(
        data().encode(layer_axis(), colour_of("mode", []), tooltip=tips("layer rank rank_low rank_high")),
        "y",
        "rank",
        ("rank_low", "rank_high"),
        bar={"strokeWidth": 3, "opacity": 0.5},
        title="rank (1 is replaced first)",
        scale=alt.Scale(reverse=True, domain=[0.5, len(rows) + 0.5], nice=False),
        axis=alt.Axis(format="d", tickMinStep=1),
    )
    return Chart(
        key=f"rank-{mode}",
        title=f"Rank intervals, {mode}",
        note="Point: the rank. Bar: its 95 % interval over bootstrap resamples of the samples.",
        description=f"Rank of every decoder layer under {mode} with intervals. Replaced first: layers {first}.",
        marks=alt.layer(*marks),
        height=240,
        data={"rows": rows},
        numbers=grid(
            f"Ranking under {mode}", ranked, "rank layer rank_low rank_high mean", files=["lc_layers.parquet"]
        ),
        half=True,
    )


def plan_strips(
    plans: Sequence[tuple[str, Sequence[str]]], *, of: str, key: str = "plans", files: Sequence[str] = ()
) -> Chart:
    """Draw plans (name and modes) as strips of layers, one colour per mode."""
    names = {name for name, _ in plans}
    modes = {mode for _, modes in plans for mode in modes}
    changed = " ".join(
        f"{name}: {_changed(modes)} of {len(modes)} layers under another mode than full." for name, modes in plans[:12]
    )
    rows = [{"plan": name, "layer": layer, "mode": mode} for name, modes in plans for layer, mode in enumerate(modes)]
    counted = [[name, len(modes), _changed(modes), _layers_by_mode(modes)] for name, modes in plans]
    return Chart(
        key=key,
        title=f"Plans of {of}, layer by layer",
        note="One strip per plan, from the first decoder layer to the last.",
        description=f"Strips of decoder layers coloured by mode. {changed}",
        marks=data()
        .mark_rect(cornerRadius=2)
        .encode(
            layer_bands().scale(paddingInner=0.08),
            line_axis("plan").scale(paddingInner=0.25),
            colour_of("mode", modes, lines=names, symbols="square"),
            tooltip=tips("plan layer mode"),
        ),
        height=max(40, 26 * len(names)),
        data={"rows": rows},
        numbers=Grid(caption="Plans", columns=("plan", "layers", "not full", "modes"), rows=counted, files=files),
    )


def _layers_by_mode(modes: Sequence[str]) -> str:
    found: Mapping[str, list[str]] = defaultdict(list)
    for layer, mode in enumerate(modes):
        found[mode].append(str(layer))
    return ", ".join(f"{mode}: {' '.join(layers)}" for mode, layers in found.items() if mode != Mode.FULL)


# Up to so many samples have a line each; more are drawn as so many groups.
MOST_LINES: Final = 100
_GROUPS: Final = 50
_NAMED: Final = 30


def heat_chart(sweep: SweepData, mode: str) -> Chart:
    """Draw LC of each sample in each layer, the sample with the highest mean LC on top.

    Of more than `MOST_LINES` samples, a line is the median of a group that follows each other in that order.
    """
    kl_SL, total = sweep.measured[mode].kl_SL, len(sweep.samples)
    kept = np.flatnonzero(~np.isnan(kl_SL).any(axis=1))
    order = kept[np.argsort(-kl_SL[kept].mean(axis=1), kind="stable")]
    grouped = len(order) > MOST_LINES
    groups = np.array_split(order, _GROUPS if grouped else len(order))
    note = f"{len(order)} samples, the one with the highest mean LC on top; colours are logarithmic."
    if total > len(kl_SL):
        note = (
            f"An even choice of {len(order)} of {total} samples, the highest mean LC on top; colours are logarithmic."
        )
    if grouped:
        note += (
            f" A line is the median of {len(groups[-1])} to {len(groups[0])} samples next to each other in that order."
        )
        ends = np.cumsum([len(group) for group in groups]).tolist()
        names = [f"samples {end - len(group) + 1} to {end}" for group, end in zip(groups, ends, strict=True)]
    else:
        names = [sweep.sample_ids[place] for place in order.tolist()]
    values = [np.median(kl_SL[group], axis=0).tolist() for group in groups]
    bottom = log_bottom(chain.from_iterable(values), sweep.manifest.noise_floor)
    rows = [
        {"sample": name, "layer": layer, "lc": float(f"{value:.3g}"), "shown": float(f"{max(value, bottom):.3g}")}
        for name, line in zip(names, values, strict=True)
        for layer, value in enumerate(line)
    ]
    # Whole pixels per line and layer: anything else leaves seams between the cells.
    height = len(names) * min(22, max(3, 300 // len(names)))
    quantiles = np.quantile(kl_SL[kept], (0.0, 0.1, 0.5, 0.9, 1.0), axis=0).T.tolist()
    return Chart(
        key=f"heat-{mode}",
        title=f"LC by sample and layer, {mode}",
        note=note,
        description=f"Heat map of LC by sample and decoder layer under {mode}. {note}",
        marks=_heat_marks(len(names) <= _NAMED, height),
        height=height,
        data={"rows": rows},
        numbers=Grid(
            caption=f"LC of the samples under {mode} in nats, by layer",
            columns=("layer", "least", "10 %", "median", "90 %", "most"),
            rows=[[layer, *column] for layer, column in enumerate(quantiles)],
            files=sweep.parts,
        ),
        canvas=True,
        half=True,
    )


def _heat_marks(named: bool, height: int) -> Any:
    y = line_axis("sample", 110)
    if not named:
        y = y.title("samples, high LC to low").axis(labels=False, ticks=False)
    legend = alt.Legend(
        title="LC (nats)", format=".0e", orient="right", gradientLength=min(140, max(height, 60)), tickCount=4
    )
    return (
        data()
        .mark_rect()
        .encode(
            layer_bands().scale(round=True),
            y,
            alt.Color("shown:Q", scale=alt.Scale(type="log"), legend=legend),
            tooltip=tips("sample layer", lc=".2e"),
        )
    )
