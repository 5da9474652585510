"""A task's metrics over its documents, by lmms-eval's own functions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from numbers import Real
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from shortv.errors import ShortVError
from shortv.evals.marking import Marked

_ERRORS: Final = ("stderr", "stderr_clt", "stderr_clustered")
# What lmms-eval adds per metric for tasks that ask several times.
_OF_REPEATS: Final = ("expected_accuracy", "consensus_accuracy", "internal_variance", "consistency_rate")


class MetricRow(NamedTuple):
    """One metric under one filter, over the `n` documents that it counts.

    `value` is None where the task's aggregation gives something else than a number (a table, a submission file).
    The other two errors are lmms-eval's `stderr_clt` and `stderr_clustered`.
    """

    metric: str
    filter: str
    value: float | None
    stderr: float | None
    n: int
    stderr_clt: float | None = None
    stderr_clustered: float | None = None


def aggregate(name: str, task: Any, marked: Sequence[Marked], folder: str | None) -> tuple[MetricRow, ...]:
    """Compute the metrics of documents in their order; without documents there are none.

    Raises:
        ShortVError: the task's own aggregation fails.
    """
    # Beside TaskOutput: the module takes seconds to import.
    from lmms_eval.evaluator_utils import TaskOutput

    output = TaskOutput.from_taskdict(name, task)
    for scores in marked:
        for chosen, values in scores.values.items():
            for metric, value in values.items():
                output.sample_metrics[metric, chosen].append(value)
        for chosen, lists in scores.repeated.items():
            for metric, each in lists.items():
                output.per_sample_metrics[metric, chosen].append(each)
    with contextlib.ExitStack() as stack:
        # lmms-eval shows bars and lines of its own for errors that it bootstraps.
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        path = folder if folder is not None else stack.enter_context(TemporaryDirectory(prefix="shortv-submissions-"))
        _calculate(output, path)
    return tuple(row for key in output.sample_metrics for row in _rows(output, *key))


def _calculate(output: Any, folder: str) -> None:
    before = getattr(output.task, "args", None)
    # Tasks read from the arguments of lmms-eval's command where to write.
    output.task.args = SimpleNamespace(output_path=folder, log_samples_suffix="")
    try:
        output.calculate_aggregate_metric()
        output.calculate_clt_aggregate_metric()
        output.calculate_stability_metrics()
    except Exception as error:  # tasks run third-party code
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ShortVError(f"the metrics of task {output.task_name!r} cannot be computed: {why}") from error
    finally:
        output.task.args = before


def _rows(output: Any, metric: str, chosen: str) -> list[MetricRow]:
    found, n = output.agg_metrics, len(output.sample_metrics[metric, chosen])
    if f"{metric},{chosen}" not in found:
        return []
    errors = [
        number_of(found.get(f"{metric}_{kind},{chosen}")) for kind in ("stderr", "stderr_clt", "stderr_clustered")
    ]
    rows = [MetricRow(metric, chosen, number_of(found[f"{metric},{chosen}"]), errors[0], n, errors[1], errors[2])]
    for kind in _OF_REPEATS:
        if f"{metric}_{kind},{chosen}" in found:
            rows.append(MetricRow(f"{metric}_{kind}", chosen, number_of(found[f"{metric}_{kind},{chosen}"]), None, n))
    return rows


def number_of(value: Any) -> float | None:
    """A number of any library as a float; None for anything else."""
    return float(value) if isinstance(value, Real) else None
