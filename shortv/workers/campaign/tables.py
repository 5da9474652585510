"""The tables of a campaign, made from the parts of its answers, a group (model and task) at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shortv.costs import layer_flops
from shortv.errors import one_line
from shortv.evals.judging import Judge
from shortv.evals.scoring import MetricRow
from shortv.learned.dyvte import measured_exit_ratio
from shortv.learned.registry import plan_flops_ratio
from shortv.plan import Mode, PartsKind
from shortv.workers.campaign.cells import Cell, CellState, Group
from shortv.workers.campaign.comparisons import comparisons, sides_of
from shortv.workers.campaign.folder import CampaignFolder
from shortv.workers.campaign.plans import Training
from shortv.workers.campaign.producer import judge_rows

Row = Mapping[str, Any]
Rows = dict[str, list[dict[str, Any]]]

_TIMES = ("queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "latency_ms")
_TOKENS = ("prompt_tokens", "visual_tokens", "completion_tokens", "exit_layer")
_COLUMNS = (
    *("cell", "doc", "sample_id", "error", "prediction", "scores", "values", "decode_ms", "busy_ms", "prefill_batch"),
    *_TIMES,
    *_TOKENS,
)
_MEASURED = (
    *("batch", "rounds", "batch_prefill_ms", "prefill_ratio", "prefill_ratio_stderr", "step_ms", "ttft_ms"),
    *("kv_bytes", "peak_bytes", "idle_share", "replicas"),
)


def group_tables(
    group: Group, folder: CampaignFolder, *, limit: float | None, seed: int, problem: str | None = None
) -> Rows:
    """Return the rows of every table for a group, from the answers that are there.

    Their order and values do not depend on the order in which units were committed.

    Args:
        limit: documents that the recipe asks for.
        seed: of the resamples.
        problem: why documents of the group lack answers, if something kept them from being asked.
    """
    answers = cell_answers(folder, group)
    # Some tasks call a judge in their aggregation.
    judge = Judge(folder.judged.of(group.task.name, [None]))
    measured = folder.measured()
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {}
    for key, cell in group.distinct.items():
        found[key] = _, _, speed = _cell(cell, answers[key], measured.get(key, {}), problem, judge)
        if cell.entry.plan.downsample is not None:
            speed["flops_ratio"] = _downsampled_ratio(cell, speed, found[group.cells[0].key][2])
    folder.commit_judged(judge_rows(group.task.name, judge))
    rows: Rows = {"cells": [], "metrics": [], "speed": [], "comparisons": []}
    for cell in group.cells:
        summary, metrics, speed = found[cell.key]
        training = cell.entry.training or Training()
        rows["cells"].append(
            cell.names
            | summary
            | {
                "revision": cell.model.revision,
                "plan_digest": cell.entry.plan.digest,
                "same_as": cell.entry.same_as,
                "task_digest": cell.task.digest,
                "limit": limit,
                "seed": seed,
                "flops_ratio": speed["flops_ratio"],
                "learned_parameters": training.parameters,
                "train_seconds": training.seconds,
            }
        )
        rows["metrics"] += [cell.names | {"plan_digest": cell.entry.plan.digest} | metric for metric in metrics]
        rows["speed"].append(cell.names | speed)
    rows["comparisons"] = comparisons(group, {key: sides_of(answers[key]) for key in group.distinct}, seed=seed)
    return rows


def cell_answers(folder: CampaignFolder, group: Group) -> dict[str, pa.Table]:
    """Return the answers of each cell of a group, by key, in the order of the documents."""
    keys, count = list(group.distinct), group.task.num_docs
    parts: dict[str, list[pa.Table]] = {key: [] for key in keys}
    for part in folder.answers.scan(_COLUMNS, cells=keys):
        part = part.filter(pc.less(part["doc"], count))
        for key in keys:
            own = part.filter(pc.equal(part["cell"], key))
            if len(own):
                parts[key].append(own)
    empty = next((some[0].slice(0, 0) for some in parts.values() if some), None)
    found = {}
    for key in keys:
        table = pa.concat_tables(parts.pop(key) or ([empty] if empty is not None else [_empty()]))
        found[key] = table.take(pc.sort_indices(table["doc"]))
    return found


def _empty() -> pa.Table:
    from reports.schemas import schema_of

    return schema_of("answers").empty_table().select(_COLUMNS)


def _cell(
    cell: Cell, answers: pa.Table, measured: Row, problem: str | None, judge: Judge
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return the state, the metrics and the speed of a cell."""
    good = answers.filter(pc.is_null(answers["error"]))
    metrics, failure = cell.task.aggregate(good["values"].to_pylist(), judge=judge) if len(answers) else ((), None)
    n, errors, missing = len(answers), len(answers) - len(good), cell.task.num_docs - len(answers)
    message = failure or _message(cell, answers, missing, problem)
    failed = failure is not None or not len(good)
    state = CellState.FAILED if failed else CellState.PARTIAL if errors or missing else CellState.COMPLETE
    busy = _known(good, "busy_ms")
    summary = {"state": state, "n": n, "errors": errors, "message": message, "busy_seconds": float(busy.sum() / 1e3)}
    return summary, [_finite(metric) for metric in metrics], _speed(cell, good, measured)


def _message(cell: Cell, answers: pa.Table, missing: int, problem: str | None) -> str | None:
    """Return why a cell lacks answers, None where it lacks none."""
    if not cell.task.num_docs:
        return "the task has no samples; raise the limit, or check the data of the task"
    if missing:
        return f"{missing} of {cell.task.num_docs} samples have no answer: {problem or 'they were not asked'}"
    errors = answers.filter(pc.is_valid(answers["error"]))
    if not len(errors):
        return None
    first = errors.slice(0, 1).to_pylist()[0]
    reason = one_line(Exception(first["error"]))
    return f"{len(errors)} of {len(answers)} samples failed; the first, {first['sample_id']!r}: {reason}"


def _finite(metric: MetricRow) -> dict[str, Any]:
    """Replace NaN and infinity by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(metric).items()
    }


def _known(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return the values of a column that are known."""
    return np.asarray(table[name].drop_null().cast(pa.float64()).to_numpy())


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _speed(cell: Cell, good: pa.Table, measured: Row) -> dict[str, Any]:
    """Summarise the times and token counts of the answers, beside what was measured of the plan."""
    counted = good.filter(pc.is_valid(good["prompt_tokens"]))
    visual = counted["visual_tokens"].fill_null(0).to_numpy()
    text = counted["prompt_tokens"].to_numpy() - visual
    decoded = good.filter(pc.fill_null(pc.greater(good["completion_tokens"], 0), False))
    per_token = _known(decoded, "decode_ms") / _known(decoded, "completion_tokens") if len(decoded) else np.empty(0)
    busy = _known(good, "busy_ms").sum()
    return {
        "n": len(good),
        **{f"{name}_median": _median(_known(good, name)) for name in (*_TIMES, "prefill_batch")},
        "decode_ms_per_token_median": _median(per_token),
        "samples_per_second": float(1e3 * len(good) / busy) if busy > 0 else None,
        "t": float(text.mean()) if len(text) else None,
        "v": float(visual.mean()) if len(visual) else None,
        "flops_ratio": _flops_ratio(cell, counted, text, visual),
        **{name: measured.get(name) for name in _MEASURED},
    }


def _flops_ratio(cell: Cell, counted: pa.Table, text: NDArray[Any], visual: NDArray[Any]) -> float | None:
    """Return the measured ratio if each sample has its own exit layer, else the ratio that the plan predicts."""
    sizes, plan = cell.model.architecture, cell.entry.plan
    if text.sum() + visual.sum() <= 0:
        return None
    if plan.parts is None or plan.parts.kind is not PartsKind.DYVTE:
        return plan_flops_ratio(plan, sizes, float(text.mean()), float(visual.mean()))
    # A prompt without visual tokens costs the same with any exit layer.
    layers = counted["exit_layer"].to_pylist()
    rows = zip(layers, text.tolist(), visual.tolist(), strict=True)
    exits = [(sizes.num_layers if not v else layer, t, v) for layer, t, v in rows]
    return measured_exit_ratio(sizes, [(layer, t, v) for layer, t, v in exits if layer is not None])


def _downsampled_ratio(cell: Cell, speed: Row, full: Row) -> float | None:
    """Return the FLOPs of the full model at the sizes of smaller images divided by those at the images' own sizes."""
    sizes = [(row["t"], row["v"]) for row in (speed, full)]
    own, whole = (layer_flops(cell.model.architecture, Mode.FULL, t or 0.0, v or 0.0) for t, v in sizes)
    return own / whole if own and whole else None
