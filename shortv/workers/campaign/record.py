"""The commit record of a cell: written last, so that what it speaks of is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, Final

from reports.manifest import plain
from reports.masking import masked
from shortv.costs import measured_exit_ratio, plan_flops_ratio
from shortv.errors import ShortVError
from shortv.evals.aggregation import MetricRow
from shortv.evals.scoring import Sample
from shortv.plan import PartsKind
from shortv.workers.campaign.cells import Cell
from shortv.workers.campaign.results import CellResult

RECORD_VERSION: Final = 1


class CellState(StrEnum):
    """How a cell ended: with all samples, without some of them, or without any."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast the answers came, and the mean text (`t`) and visual (`v`) tokens of their prompts; None: unknown.

    `decode_ms_per_token_median` divides a sample's decode time by the tokens of its answer.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """What became of a cell. `identity` is masked; `answers_digest` is that of its answers file, if it has one."""

    schema_version: int = RECORD_VERSION
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", masked(self.identity))

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        values = {item.name: plain(getattr(self, item.name)) for item in fields(self) if item.name != "speed"}
        return values | {"metrics": [metric._asdict() for metric in self.metrics], "speed": asdict(self.speed)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str) -> CellRecord:
        """Rebuild a record, strictly. Raises ShortVError for one that is damaged or from another release."""
        if value.get("schema_version") != RECORD_VERSION:
            raise ShortVError(f"{shown} has schema version {value.get('schema_version')!r}, not {RECORD_VERSION}")
        wrong = [name for name, kind in _TYPES.items() if name not in value or not isinstance(value[name], kind)]
        if wrong or len(value) != len(_TYPES):
            raise ShortVError(f"{shown} has missing, unknown or mistyped fields {wrong or sorted(value)}")
        try:
            metrics = tuple(MetricRow(**metric) for metric in value["metrics"])
            changed = {"metrics": metrics, "speed": Speed(**value["speed"]), "state": CellState(value["state"])}
        except (TypeError, ValueError) as error:
            raise ShortVError(f"{shown} is damaged: {error}") from error
        return cls(**{**value, **changed})


_TYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "schema_version": int,
        "key": str,
        "identity": dict,
        "state": str,
        "n": int,
        "errors": int,
        "message": str | None,
        "answers_digest": str | None,
        "metrics": list,
        "speed": dict,
        "started": str,
        "finished": str,
        "wall_seconds": int | float,
    }
)


def measure_speed(cell: Cell, result: CellResult, seconds: float) -> Speed:
    """Summarise the times and token counts of the samples that were answered in `seconds`."""
    answered = [sample for sample in result.samples if sample.error is None]
    text = [
        sample.prompt_tokens - (sample.visual_tokens or 0) for sample in answered if sample.prompt_tokens is not None
    ]
    t = fmean(text) if text else None
    visual = [sample.visual_tokens for sample in answered if sample.visual_tokens is not None]
    v = fmean(visual) if visual else None
    return Speed(
        n=len(answered),
        prefill_ms_median=_median(sample.prefill_ms for sample in answered),
        decode_ms_per_token_median=_median(
            sample.decode_ms / sample.completion_tokens
            for sample in answered
            if sample.decode_ms is not None and sample.completion_tokens
        ),
        latency_ms_median=_median(sample.latency_ms for sample in answered),
        samples_per_second=len(answered) / seconds if answered and seconds > 0 else None,
        t=t,
        v=v,
        flops_ratio=None if t is None or v is None or t + v <= 0 else _flops_ratio(cell, answered, t, v),
        replicas=result.replicas,
    )


def _flops_ratio(cell: Cell, answered: Sequence[Sample], t: float, v: float) -> float | None:
    """As measured where visual tokens leave sample by sample, else as the plan predicts."""
    sizes, plan = cell.model.architecture, cell.entry.plan
    if plan.parts is None or plan.parts.kind is not PartsKind.DYVTE:
        return plan_flops_ratio(plan, sizes, t, v)
    exits = []
    for sample in answered:
        tokens, visual = sample.prompt_tokens, sample.visual_tokens or 0
        # Without visual tokens it does not matter where they leave.
        layer = sample.exit_layer if visual else sizes.num_layers
        if tokens is not None and layer is not None:
            exits.append((layer, tokens - visual, visual))
    return measured_exit_ratio(sizes, exits)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
