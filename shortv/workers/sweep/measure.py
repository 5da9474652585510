"""One batch of a sweep on one model: prepared on CPUs, measured by the worker that holds the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from reports.schemas import SCHEMAS
from shortv.plan import Mode
from shortv.records import ErrorRecord, LcRecord, UsedSample
from shortv.sample import Sample
from shortv.workers.models import ModelLoader

_TABLES = {"records": "lc_samples", "used": "samples", "errors": "errors"}
RESULT_SCHEMA = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("fatal", pa.string()),
        pa.field("noise_floor", pa.float64()),
        *(pa.field(name, pa.list_(pa.struct(list(SCHEMAS[table])))) for name, table in _TABLES.items()),
    ]
)
"""A finished unit: one row, whose lists hold rows of the sweep's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows of a group of samples: each is used, or is among the errors."""

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

    def without_floor(self) -> Measured:
        """Return the rows without the noise floor, which describes a whole batch."""
        return replace(self, noise_floor=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """Outcome of a unit; `fatal` says why no unit of this sweep can be measured."""

    unit_id: str
    measured: Measured
    seconds: float = 0.0
    fatal: str | None = None

    def to_table(self) -> pa.Table:
        """Return the result as a table of one row; numbers keep every digit."""
        measured = self.measured
        row = {"unit_id": self.unit_id, "seconds": self.seconds, "fatal": self.fatal}
        lists = {name: [_plain(record) for record in getattr(measured, name)] for name in _TABLES}
        return pa.Table.from_pylist([{**row, "noise_floor": measured.noise_floor, **lists}], schema=RESULT_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> UnitResult:
        """Rebuild a result from its table."""
        (row,) = table.to_pylist()
        measured = Measured(
            records=tuple(LcRecord(**{**one, "mode": Mode(one["mode"])}) for one in row["records"]),
            used=tuple(UsedSample(**one) for one in row["used"]),
            errors=tuple(ErrorRecord(**one) for one in row["errors"]),
            noise_floor=row["noise_floor"],
        )
        return cls(unit_id=row["unit_id"], measured=measured, seconds=row["seconds"], fatal=row["fatal"])


def _plain(record: Any) -> dict[str, Any]:
    # Arrow takes exact strings only in some builds: an enumeration member becomes its value.
    return {name: str(value) if isinstance(value, str) else value for name, value in asdict(record).items()}


class SweepEngine(ModelLoader):
    """A model in a sweep: how it is loaded, and how it measures batches. Tests override its methods."""

    def preprocess(self, preprocessor: Any, samples: Sequence[Sample], *, alone: bool) -> bytes:
        """Return the inputs of a batch as a safetensors document; samples that cannot be used are in its header.

        Args:
            preprocessor: of `load_preprocessor`, or the loaded model.
            alone: also prepare each usable sample as a batch of its own, for the noise floor.
        """
        from safetensors.torch import save

        from shortv.families import preprocess

        encoded = preprocess(preprocessor, samples)
        order = {sample.sample_id: index for index, sample in enumerate(samples)}
        errors = [
            asdict(ErrorRecord(sample_id=one.sample_id, stage=fault.stage, error=fault.error, message=fault.message))
            for one, fault in encoded.errors
        ]
        header = {"used": [order[one.sample_id] for one in encoded.samples], "errors": errors}
        batches = [encoded.batch] if encoded.batch else []
        if alone:
            batches += [found for one in encoded.samples if (found := preprocess(preprocessor, [one]).batch)]
        tensors = {name: tensor for number, batch in enumerate(batches) for name, tensor in _tensors(number, batch)}
        return save(tensors, {"header": json.dumps(header)})

    def measure(
        self,
        loaded: Any,
        samples: Sequence[Sample],
        inputs: bytes,
        *,
        layers: range,
        modes: Sequence[Mode],
        stack: int | None,
    ) -> Measured:
        """Run and compare one batch; the noise floor comes with the first layer where all samples can be used.

        Raises:
            torch.OutOfMemoryError: a single ablation of this batch does not fit.
        """
        from shortv.sweep.engine import measure, noise_floor

        header, batches = _batches(inputs)
        errors = [ErrorRecord(**error) for error in header["errors"]]
        if not batches:
            return Measured(errors=tuple(errors))
        batch = batches[0].on(loaded)
        found = measure(loaded, batch, layers=layers, modes=modes, stack=stack)
        encoded, bad = [samples[index] for index in header["used"]], set(found.non_finite)
        errors += [_non_finite(encoded[index]) for index in sorted(bad)]
        used = [
            UsedSample(
                sample_id=sample.sample_id,
                dataset=sample.dataset,
                prompt=sample.prompt,
                answer=sample.answer,
                n_text=n_text,
                n_visual=n_visual,
            )
            for index, (sample, n_text, n_visual) in enumerate(
                zip(encoded, batch.types.n_text, batch.types.n_visual, strict=True)
            )
            if index not in bad
        ]
        floor = None
        if 0 in layers and not bad and len(batches) > 1:
            floor = noise_floor(loaded, [one.on(loaded) for one in batches[1:]], batch, found.full_BV)
        records = found.records([sample.sample_id for sample in encoded])
        return Measured(records=tuple(records), used=tuple(used), errors=tuple(errors), noise_floor=floor)

    def noise_floor(self, loaded: Any, samples: Sequence[Sample]) -> float:
        """Return the noise floor of samples as one batch, in nats."""
        from shortv.sweep.engine import noise_floor

        _, batches = _batches(self.preprocess(loaded, samples, alone=True))
        batch, *alone = [one.on(loaded) for one in batches]
        return noise_floor(loaded, alone, batch)


def _tensors(number: int, batch: Any) -> list[tuple[str, Any]]:
    """Name the tensors of a batch by its number: 0 is the batch, the others hold one sample each."""
    types = {"visual_BT": batch.types.visual_BT, "text_BT": batch.types.text_BT}
    groups = (("input", batch.inputs), ("type", types))
    return [
        (f"{number}.{kind}.{name}", tensor.contiguous().clone())
        for kind, group in groups
        for name, tensor in group.items()
    ]


def _batches(inputs: bytes) -> tuple[dict[str, Any], list[Any]]:
    from safetensors.torch import load

    from shortv.families import Batch
    from shortv.families.tokens import TokenTypes

    size = int.from_bytes(inputs[:8], "little")
    header = json.loads(json.loads(inputs[8 : 8 + size])["__metadata__"]["header"])
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for key, tensor in load(inputs).items():
        number, kind, name = key.split(".", 2)
        groups.setdefault(int(number), {"input": {}, "type": {}})[kind][name] = tensor
    found = [groups[number] for number in sorted(groups)]
    return header, [Batch(inputs=one["input"], types=TokenTypes(**one["type"])) for one in found]


def _non_finite(sample: Sample) -> ErrorRecord:
    return ErrorRecord(
        sample_id=sample.sample_id,
        stage="measure",
        error="non-finite",
        message="the model gives logits that are NaN or infinite for this sample; try --dtype float32",
    )
