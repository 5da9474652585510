"""The cells of a campaign, model x plan x task: what decides a cell's result, the result, and its record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from reports.locations import masked
from reports.manifest import digest_of, utc_now, versions
from shortv.architecture import Architecture
from shortv.errors import ShortVError, one_line
from shortv.evals.scoring import MetricRow, ScoredSample
from shortv.learned.dyvte import measured_exit_ratio
from shortv.learned.registry import plan_flops_ratio
from shortv.plan import PartsKind, Plan
from shortv.workers.campaign.plans import ModelFacts, PlanEntry
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

    @property
    def shown(self) -> str:
        """Return the name of the cell in messages."""
        return f"{self.model.name} {self.entry.name} {self.task.name}"


def list_cells(
    spec: CampaignSpec,
    models: Sequence[ModelFacts],
    entries: Mapping[str, Sequence[PlanEntry]],
    tasks: Sequence[TaskFacts],
) -> list[Cell]:
    """Return the cells ordered by model, then by task, then by plan, the full model first."""
    return [_cell(spec, model, entry, task) for model in models for task in tasks for entry in entries[model.name]]


def _cell(spec: CampaignSpec, model: ModelFacts, entry: PlanEntry, task: TaskFacts) -> Cell:
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
    return Cell(model=model, entry=entry, task=task, identity=MappingProxyType(identity), key=digest_of(identity))


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """All samples of a cell, each once, and the metrics over those without an error.

    `seconds` is how long the requests took, without loading and scoring (None: the time of the whole cell).
    With a `problem` there are no metrics: the answers are stored, and the cell has failed.
    """

    samples: Sequence[ScoredSample]
    metrics: Sequence[MetricRow]
    seconds: float | None = None
    replicas: int | None = None
    problem: str | None = None


RunCell = Callable[[Plan | None, str], CellResult]
"""Runs one task under a plan; None is the unmodified model. Raises ShortVError when the cell has failed."""


class Runner(Protocol):
    """What runs the cells of a campaign."""

    def pin(self, model: str, spec: CampaignSpec) -> str | None:
        """Return the commit that the spec's revision of a model names now. Raises Refused."""

    def describe(self, model: str, spec: CampaignSpec) -> Architecture:
        """Read a model's sizes from its configuration alone. Raises Refused."""

    def task(self, name: str, spec: CampaignSpec) -> TaskFacts:
        """Load a task once. Raises Refused for an unknown task, ShortVError when its data cannot be loaded."""

    def open(self, model: str, plans: Sequence[Plan], spec: CampaignSpec) -> AbstractContextManager[RunCell]:
        """Start replicas that serve the model itself and these plans, and stop them at the end."""


class CellState(StrEnum):
    """How a cell ended: with all samples, without some of them, or without any."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    FAILED = "failed"


class _Stored(BaseModel):
    """Base of what a record file holds: strict types, no unknown fields, finite numbers."""

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

    `identity` is masked; `answers_digest` is that of the cell's answers file, if it has one.
    """

    schema_version: Literal[1] = 1
    key: str
    identity: Mapping[str, Any]
    state: CellState
    n: int
    errors: int
    message: str | None
    answers_digest: str | None
    metrics: tuple[MetricRow, ...]
    speed: Speed
    started: str
    finished: str
    wall_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str) -> CellRecord:
        """Rebuild a record, strictly. Raises ShortVError for one that is damaged or from another release."""
        try:
            return cls.model_validate(value)
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            raise ShortVError(f"{shown} is damaged or from another release: {one_line(error)}") from error


def record_of(cell: Cell, result: CellResult, started: str, wall_seconds: float) -> CellRecord:
    """Return the record of a cell that ran, without the digest of its answers.

    Raises:
        ShortVError: there are no samples, or one occurs twice.
    """
    _check_samples(result.samples)
    errors = [sample for sample in result.samples if sample.error is not None]
    state = CellState.COMPLETE if not errors else CellState.PARTIAL
    return _record(
        cell,
        started,
        wall_seconds,
        state=CellState.FAILED if result.problem or len(errors) == len(result.samples) else state,
        n=len(result.samples),
        errors=len(errors),
        message=result.problem or (_failed_samples(errors, len(result.samples)) if errors else None),
        metrics=tuple(_finite(metric) for metric in result.metrics),
        speed=_speed(cell, result, wall_seconds if result.seconds is None else result.seconds),
    )


def failed_record(cell: Cell, error: Exception, started: str, wall_seconds: float) -> CellRecord:
    """Return the record of a cell without a result. Errors of other libraries are named by their type."""
    message = one_line(error) if isinstance(error, ShortVError) else f"{type(error).__name__}: {one_line(error)}"
    return _record(cell, started, wall_seconds, state=CellState.FAILED, message=message)


def _record(cell: Cell, started: str, wall_seconds: float, *, state: CellState, **found: Any) -> CellRecord:
    empty = {"n": 0, "errors": 0, "message": None, "answers_digest": None, "metrics": (), "speed": Speed()}
    return CellRecord(
        key=cell.key,
        identity=masked(cell.identity),
        state=state,
        started=started,
        finished=utc_now(),
        wall_seconds=wall_seconds,
        **{**empty, **found},
    )


def _check_samples(samples: Sequence[ScoredSample]) -> None:
    if not samples:
        raise ShortVError("the task has no samples; raise the limit, or check the data of the task")
    sample_id, times = Counter(sample.sample_id for sample in samples).most_common(1)[0]
    if times > 1:
        raise ShortVError(f"sample {sample_id!r} occurs {times} times; the documents of the task need distinct ids")


def _failed_samples(errors: Sequence[ScoredSample], total: int) -> str:
    first = min(errors, key=lambda sample: sample.sample_id)
    reason = one_line(Exception(first.error))
    return f"{len(errors)} of {total} samples failed; the first, {first.sample_id!r}: {reason}"


def _finite(metric: MetricRow) -> MetricRow:
    """Replace NaN and infinity, which JSON does not have, by None."""
    values = asdict(metric)
    unknown = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return MetricRow(**(values | dict.fromkeys(unknown)))


def _speed(cell: Cell, result: CellResult, seconds: float) -> Speed:
    """Summarise the times and token counts of the samples that succeeded within `seconds`."""
    succeeded = [sample for sample in result.samples if sample.error is None]
    text = [
        sample.prompt_tokens - (sample.visual_tokens or 0) for sample in succeeded if sample.prompt_tokens is not None
    ]
    t = fmean(text) if text else None
    visual = [sample.visual_tokens for sample in succeeded if sample.visual_tokens is not None]
    v = fmean(visual) if visual else None
    return Speed(
        n=len(succeeded),
        prefill_ms_median=_median(sample.prefill_ms for sample in succeeded),
        decode_ms_per_token_median=_median(
            sample.decode_ms / sample.completion_tokens
            for sample in succeeded
            if sample.decode_ms is not None and sample.completion_tokens
        ),
        latency_ms_median=_median(sample.latency_ms for sample in succeeded),
        samples_per_second=len(succeeded) / seconds if succeeded and seconds > 0 else None,
        t=t,
        v=v,
        flops_ratio=None if t is None or v is None or t + v <= 0 else _flops_ratio(cell, succeeded, t, v),
        replicas=result.replicas,
    )


def _flops_ratio(cell: Cell, succeeded: Sequence[ScoredSample], t: float, v: float) -> float | None:
    """Return the measured ratio if each sample has its own exit layer, else the ratio that the plan predicts."""
    sizes, plan = cell.model.architecture, cell.entry.plan
    if plan.parts is None or plan.parts.kind is not PartsKind.DYVTE:
        return plan_flops_ratio(plan, sizes, t, v)
    exits = []
    for sample in succeeded:
        tokens, visual = sample.prompt_tokens, sample.visual_tokens or 0
        # A prompt without visual tokens costs the same with any exit layer.
        layer = sample.exit_layer if visual else sizes.num_layers
        if tokens is not None and layer is not None:
            exits.append((layer, tokens - visual, visual))
    return measured_exit_ratio(sizes, exits)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
