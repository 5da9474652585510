"""What came of one unit, as a JSON document that crosses processes and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shortv.plan import Mode
from shortv.records import ErrorRecord, LcRecord, UsedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows of a group of samples: each is used, or stands in the errors."""

    records: tuple[LcRecord, ...] = ()
    used: tuple[UsedSample, ...] = ()
    errors: tuple[ErrorRecord, ...] = ()
    noise_floor: float | None = None
    """In nats; None where it was not measured."""

    def __add__(self, other: Measured) -> Measured:
        floors = [floor for floor in (self.noise_floor, other.noise_floor) if floor is not None]
        return Measured(
            records=self.records + other.records,
            used=self.used + other.used,
            errors=self.errors + other.errors,
            noise_floor=max(floors, default=None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """Outcome of a unit; `fatal` says why no unit of this sweep can be measured."""

    unit_id: str
    measured: Measured
    seconds: float = 0.0
    fatal: str | None = None

    def to_json(self) -> str:
        """The result as one line of JSON; numbers keep every digit, NaN is refused."""
        value = {
            "unit_id": self.unit_id,
            "seconds": self.seconds,
            "fatal": self.fatal,
            "noise_floor": self.measured.noise_floor,
            "records": [list(asdict(record).values()) for record in self.measured.records],
            "used": [asdict(sample) for sample in self.measured.used],
            "errors": [asdict(error) for error in self.measured.errors],
        }
        return json.dumps(value, allow_nan=False)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> UnitResult:
        """Rebuild a result from its parsed JSON."""
        measured = Measured(
            records=tuple(_record(*row) for row in value["records"]),
            used=tuple(UsedSample(**row) for row in value["used"]),
            errors=tuple(ErrorRecord(**row) for row in value["errors"]),
            noise_floor=value["noise_floor"],
        )
        return cls(unit_id=value["unit_id"], measured=measured, seconds=value["seconds"], fatal=value["fatal"])


def _record(
    sample_id: str, mode: str, layer: int, kl_full_ablated: float, kl_ablated_full: float, top1_changed: bool
) -> LcRecord:
    return LcRecord(
        sample_id=sample_id,
        mode=Mode(mode),
        layer=layer,
        kl_full_ablated=kl_full_ablated,
        kl_ablated_full=kl_ablated_full,
        top1_changed=top1_changed,
    )
