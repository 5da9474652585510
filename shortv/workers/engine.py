"""The seam between workers and the model: what a worker asks of a model, and the real answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from shortv.architecture import Architecture
from shortv.plan import Mode
from shortv.records import ErrorRecord, UsedSample
from shortv.sample import Sample
from shortv.workers.outcome import Measured
from shortv.workers.request import ModelSpec


class Engine(Protocol):
    """Loads a model and measures batches with it; it is sent to each worker, so it holds no model itself."""

    def describe(self, spec: ModelSpec) -> Architecture:
        """Check on the driver that the model can be swept; raises Refused."""

    def pin(self, spec: ModelSpec) -> ModelSpec:
        """The same model at the commit that its revision names now, for all workers and attempts; raises Refused."""

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> Any:
        """Load the model in a worker; raises ShortVError when that cannot work."""

    def measure(
        self, loaded: Any, samples: Sequence[Sample], *, layers: range, modes: Sequence[Mode], stack: int | None
    ) -> Measured:
        """Measure one batch; samples that cannot be used are errors of the answer."""


class ModelEngine:
    """The engine of every real sweep, over `shortv.families` and `shortv.sweep.engine`."""

    def describe(self, spec: ModelSpec) -> Architecture:
        """Read the configuration and the processor, not the weights; raises Refused."""
        from shortv.families import load_architecture, load_processor

        architecture = load_architecture(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        load_processor(
            spec.name,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )
        return architecture

    def pin(self, spec: ModelSpec) -> ModelSpec:
        """Ask the hub, or its cache where it cannot be reached; raises Refused."""
        from shortv.families import commit_of

        commit = commit_of(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        return replace(spec, revision=commit)

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> Any:
        """Load weights and processor; `threads` is the worker's share of its node's processors."""
        import torch

        from shortv.families import load

        if threads:
            torch.set_num_threads(threads)
        return load(
            spec.name,
            revision=spec.revision,
            dtype=spec.dtype,  # type: ignore[arg-type]  # the command line offers only what load takes
            device=device,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )

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
