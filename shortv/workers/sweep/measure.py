"""One batch of a sweep on one model: prepared on CPUs, measured by the worker that holds the weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from reports.schemas import table_of
from shortv.plan import Mode
from shortv.records import ErrorRecord, LcRecord, UsedSample
from shortv.sample import Sample
from shortv.workers.models import ModelLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows of a group of samples: each is used, or is among the errors."""

    records: tuple[LcRecord, ...] = ()
    used: tuple[UsedSample, ...] = ()
    errors: tuple[ErrorRecord, ...] = ()
    full_BV: Any = None
    """Log-probabilities of the clean pass, where all samples were measured together."""

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            records=self.records + other.records, used=self.used + other.used, errors=self.errors + other.errors
        )


def unit_table(
    unit_id: str, measured: Measured, *, noise_floor: float | None = None, fatal: str | None = None
) -> pa.Table:
    """Return a finished unit as a table of one row, whose lists `lc_samples`, `samples` and `errors` hold table rows.

    Args:
        noise_floor: of the unit's batch, in nats; None where it was not measured.
        fatal: why no unit of this sweep can be measured.
    """
    row = {
        "unit_id": pa.array([unit_id]),
        "fatal": pa.array([fatal], pa.string()),
        "noise_floor": pa.array([noise_floor], pa.float64()),
    }
    for name, records in (("lc_samples", measured.records), ("samples", measured.used), ("errors", measured.errors)):
        rows = table_of(name, records).to_struct_array().combine_chunks()
        row[name] = pa.ListArray.from_arrays([0, len(rows)], rows)
    return pa.table(row)


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
        errors = [
            asdict(ErrorRecord(sample_id=one.sample_id, stage=fault.stage, error=fault.error, message=fault.message))
            for one, fault in encoded.errors
        ]
        batches = [encoded.batch] if encoded.batch else []
        if alone:
            batches += [found for one in encoded.samples if (found := preprocess(preprocessor, [one]).batch)]
        tensors: dict[str, Any] = {}
        for number, batch in enumerate(batches):
            named = {"visual_BT": batch.types.visual_BT, "text_BT": batch.types.text_BT, **batch.inputs}
            tensors |= {f"{number}.{name}": tensor.contiguous().clone() for name, tensor in named.items()}
        header = {"used": [one.sample_id for one in encoded.samples], "errors": errors}
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
        """Run one batch, prepared as `inputs`, and compare it with its ablations.

        Raises:
            torch.OutOfMemoryError: a single ablation of this batch does not fit.
        """
        from shortv.sweep.engine import measure

        header, batches = _batches(inputs)
        errors = [ErrorRecord(**error) for error in header["errors"]]
        if not batches:
            return Measured(errors=tuple(errors))
        batch = batches[0].on(loaded)
        found = measure(loaded, batch, layers=layers, modes=modes, stack=stack)
        used = []
        by_id = {sample.sample_id: sample for sample in samples}
        counts = zip(header["used"], found.finite_B.tolist(), batch.types.n_text, batch.types.n_visual, strict=True)
        for sample_id, finite, n_text, n_visual in counts:
            sample = by_id[sample_id]
            if finite:
                used.append(
                    UsedSample(
                        sample_id=sample_id,
                        dataset=sample.dataset,
                        prompt=sample.prompt,
                        answer=sample.answer,
                        n_text=n_text,
                        n_visual=n_visual,
                    )
                )
            else:
                problem = "the model gives logits that are NaN or infinite for this sample; try --dtype float32"
                errors.append(ErrorRecord(sample_id=sample_id, stage="measure", error="non-finite", message=problem))
        records = tuple(found.records(header["used"]))
        return Measured(records=records, used=tuple(used), errors=tuple(errors), full_BV=found.full_BV)

    def noise_floor(self, loaded: Any, inputs: bytes, full_BV: Any = None) -> float:
        """Return the noise floor of a batch in nats; `inputs` holds each of its samples alone as well.

        With `full_BV`, what `measure` found for the same inputs, the clean pass is not run again.
        """
        from shortv.sweep.engine import noise_floor

        batch, *alone = (one.on(loaded) for one in _batches(inputs)[1])
        return noise_floor(loaded, alone, batch, full_BV)


def _batches(inputs: bytes) -> tuple[dict[str, Any], list[Any]]:
    """Return the header of prepared inputs and their batches: the whole one first, then one of each sample."""
    from safetensors.torch import load

    from shortv.families import Batch
    from shortv.families.tokens import TokenTypes

    size = int.from_bytes(inputs[:8], "little")
    header = json.loads(json.loads(inputs[8 : 8 + size])["__metadata__"]["header"])
    groups: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, tensor in load(inputs).items():
        number, name = key.split(".", 1)
        groups[int(number)][name] = tensor
    batches = []
    for _, named in sorted(groups.items()):
        types = TokenTypes(visual_BT=named.pop("visual_BT"), text_BT=named.pop("text_BT"))
        batches.append(Batch(inputs=named, types=types))
    return header, batches
