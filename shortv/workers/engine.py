"""How a worker measures a batch with its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortv.plan import Mode
from shortv.records import ErrorRecord, UsedSample
from shortv.sample import Sample
from shortv.workers.models import ModelLoader
from shortv.workers.outcome import Measured


class SweepEngine(ModelLoader):
    """A model in a sweep: how it is loaded, and how it measures batches. Tests override its methods."""

    def measure(
        self, loaded: Any, samples: Sequence[Sample], *, layers: range, modes: Sequence[Mode], stack: int | None
    ) -> Measured:
        """Encode, run and compare one batch; the noise floor comes with the first layer.

        Raises:
            torch.OutOfMemoryError: a single ablation of this batch does not fit.
        """
        from shortv.families import encode
        from shortv.sweep.engine import measure, noise_floor

        encoded = encode(loaded, samples)
        errors = [
            ErrorRecord(sample_id=sample.sample_id, stage=fault.stage, error=fault.error, message=fault.message)
            for sample, fault in encoded.errors
        ]
        if encoded.batch is None:
            return Measured(errors=tuple(errors))
        found = measure(loaded, encoded.batch, layers=layers, modes=modes, stack=stack)
        bad = set(found.non_finite)
        errors += [_non_finite(encoded.samples[index]) for index in sorted(bad)]
        types = encoded.batch.types
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
                zip(encoded.samples, types.n_text, types.n_visual, strict=True)
            )
            if index not in bad
        ]
        floor = None
        if 0 in layers and not bad:
            alone = [batch for one in encoded.samples if (batch := encode(loaded, [one]).batch) is not None]
            floor = noise_floor(loaded, alone, encoded.batch, found.full_BV)
        records = found.records([sample.sample_id for sample in encoded.samples])
        return Measured(records=tuple(records), used=tuple(used), errors=tuple(errors), noise_floor=floor)


def _non_finite(sample: Sample) -> ErrorRecord:
    return ErrorRecord(
        sample_id=sample.sample_id,
        stage="measure",
        error="non-finite",
        message="the model gives logits that are NaN or infinite for this sample; try --dtype float32",
    )
