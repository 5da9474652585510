"""The cells of a campaign, model x plan x task: what decides a cell's result, the result, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean, median
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from reports.locations import masked
from reports.manifest import digest_of, utc_now, versions
from shortv.errors import ShortVError, one_line
from shortv.evals.scoring import MetricRow, Scored, ScoredSample
from shortv.learned.dyvte import measured_exit_ratio
from shortv.learned.registry import plan_flops_ratio
from shortv.plan import PartsKind, Plan
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, PlanKind
from shortv.workers.campaign.spec import CampaignSpec

# Part of every key: a change to what a cell holds makes earlier cells unfinished.
CELL_VERSION: Final = 4
_COMPUTING: Final = ("shortv", "torch", "torchvision", "transformers", "lmms-eval")


class TaskFacts(NamedTuple):
    """An lmms-eval task: `digest` covers its configuration, code and documents.

    `main_metric` is the first metric of its configuration with higher_is_better; None takes the first one scored.
    """

    name: str
    digest: str
    num_docs: int
    main_metric: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model under one plan on one task.

    `identity` is what decides the result and `key` its digest; plans with the same digest share both.
    """

    model: ModelFacts
    entry: PlanEntry
    task: TaskFacts
    identity: Mapping[str, Any]
    key: str

    @classmethod
    def of(cls, spec: CampaignSpec, model: ModelFacts, entry: PlanEntry, task: TaskFacts) -> Cell:
        """Return the cell of a campaign with these settings."""
        found = versions()
        identity = {
            "cell_version": CELL_VERSION,
            # A local model is identified by its content, not by its path.
            "model": model.digest or model.name,
            "revision": model.revision,
            "config_digest": model.architecture.config_digest,
            "plan_digest": entry.plan.digest,
            "task": task.name,
            "task_digest": task.digest,
            "limit": spec.limit,
            "seed": spec.seed,
            "gen_kwargs": spec.gen_kwargs,
            "dtype": spec.dtype,
            "attn_implementation": spec.attn_implementation,
            "versions": {name: found[name] for name in _COMPUTING},
        }
        return cls(model=model, entry=entry, task=task, identity=identity, key=digest_of(identity))

    @property
    def names(self) -> dict[str, str]:
        """What every table says of the cell."""
        return {"cell": self.key, "model": self.model.name, "plan": self.entry.name, "task": self.task.name}

    @property
    def shown(self) -> str:
        """Return the name of the cell in messages."""
        return f"{self.model.name} {self.entry.name} {self.task.name}"

    @property
    def plan(self) -> Plan | None:
        """The plan of the cell, None for the unmodified model."""
        return None if self.entry.kind is PlanKind.FULL else self.entry.plan


class CellResult(NamedTuple):
    """What running a cell gave: its scored samples, the seconds of its requests (not of scoring), and its replicas."""

    scored: Scored
    seconds: float
    replicas: int


RunCell = Callable[[Plan | None, str], CellResult]
"""Runs one task under a plan; None is the unmodified model. Raises ShortVError when the cell has failed."""


class CellState(StrEnum):
    """How a cell ended: with all samples, without some of them, or without any."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    FAILED = "failed"


class _Stored(BaseModel):
    """Base of what a record file holds: no unknown fields, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Speed(_Stored):
    """Speed of the completions, and mean text (`t`) and visual (`v`) tokens of the prompts; None: unknown.

    For `decode_ms_per_token_median`, the decode time of a sample is divided by the tokens of its completion.
    """

    n: int = 0
    prefill_ms_median: float | None = None
    decode_ms_per_token_median: float | None = None
    latency_ms_median: float | None = None
    samples_per_second: float | None = None
    t: float | None = None
    v: float | None = None
    flops_ratio: float | None = None
    replicas: int | None = None


class CellRecord(_Stored):
    """The commit record of a cell, written after its answers.

    `identity` is masked; `answers_digest` is that of the cell's answers file, if it has one. A cell with a `message`
    lacks samples, metrics or both.
    """

    schema_version: Literal[1] = 1
    key: str
    identity: Mapping[str, Any]
    state: CellState
    n: int = 0
    errors: int = 0
    message: str | None = None
    answers_digest: str | None = None
    metrics: tuple[MetricRow, ...] = ()
    speed: Speed = Speed()
    started: str
    finished: str
    wall_seconds: float

    @classmethod
    def of(cls, cell: Cell, outcome: CellResult | Exception, *, started: str, wall_seconds: float) -> CellRecord:
        """Return the record of a cell that ended just now, without the digest of its answers."""
        found = _failure(outcome) if isinstance(outcome, Exception) else _result(cell, outcome)
        times = {"started": started, "finished": utc_now(), "wall_seconds": wall_seconds}
        return cls(key=cell.key, identity=masked(cell.identity), **found, **times)


def _failure(error: Exception) -> dict[str, Any]:
    # Errors of other libraries are named by their type.
    message = one_line(error) if isinstance(error, ShortVError) else f"{type(error).__name__}: {one_line(error)}"
    return {"state": CellState.FAILED, "message": message}


def _result(cell: Cell, result: CellResult) -> dict[str, Any]:
    samples, message = result.scored.samples, result.scored.problem
    if not samples:
        return _failure(ShortVError("the task has no samples; raise the limit, or check the data of the task"))
    errors = sorted((sample.sample_id, sample.error) for sample in samples if sample.error is not None)
    if errors and message is None:
        reason = one_line(Exception(errors[0][1]))
        message = f"{len(errors)} of {len(samples)} samples failed; the first, {errors[0][0]!r}: {reason}"
    failed = result.scored.problem or len(errors) == len(samples)
    return {
        "state": CellState.FAILED if failed else CellState.PARTIAL if errors else CellState.COMPLETE,
        "n": len(samples),
        "errors": len(errors),
        "message": message,
        "metrics": tuple(map(_finite, result.scored.metrics)),
        "speed": _speed(cell, result),
    }


def _finite(metric: MetricRow) -> MetricRow:
    """Replace NaN and infinity, which JSON does not have, by None."""
    values = asdict(metric)
    unknown = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return MetricRow(**(values | dict.fromkeys(unknown)))


def _speed(cell: Cell, result: CellResult) -> Speed:
    """Summarise the times and token counts of the samples that succeeded."""
    succeeded = [sample for sample in result.scored.samples if sample.error is None]
    measured = [sample for sample in succeeded if sample.prompt_tokens is not None]
    text, visual = _tokens(measured)
    decoded = [sample for sample in succeeded if sample.decode_ms is not None and sample.completion_tokens]
    return Speed(
        n=len(succeeded),
        prefill_ms_median=_median([sample.prefill_ms for sample in succeeded]),
        decode_ms_per_token_median=_median([(one.decode_ms or 0) / (one.completion_tokens or 1) for one in decoded]),
        latency_ms_median=_median([sample.latency_ms for sample in succeeded]),
        samples_per_second=len(succeeded) / result.seconds if succeeded and result.seconds > 0 else None,
        t=fmean(text) if text else None,
        v=fmean(visual) if visual else None,
        flops_ratio=_flops_ratio(cell, measured),
        replicas=result.replicas,
    )


def _tokens(samples: Sequence[ScoredSample]) -> tuple[list[int], list[int]]:
    """Return the numbers of text and of visual tokens of samples that have them."""
    visual = [sample.visual_tokens or 0 for sample in samples]
    return [(sample.prompt_tokens or 0) - count for sample, count in zip(samples, visual, strict=True)], visual


def _flops_ratio(cell: Cell, samples: Sequence[ScoredSample]) -> float | None:
    """Return the measured ratio if each sample has its own exit layer, else the ratio that the plan predicts."""
    sizes, plan = cell.model.architecture, cell.entry.plan
    text, visual = _tokens(samples)
    if sum(text) + sum(visual) <= 0:
        return None
    if plan.parts is None or plan.parts.kind is not PartsKind.DYVTE:
        return plan_flops_ratio(plan, sizes, fmean(text), fmean(visual))
    # A prompt without visual tokens costs the same with any exit layer.
    layers = [sample.exit_layer if sample.visual_tokens else sizes.num_layers for sample in samples]
    exits = [(layer, t, v) for layer, t, v in zip(layers, text, visual, strict=True) if layer is not None]
    return measured_exit_ratio(sizes, exits)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
