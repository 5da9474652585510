"""Overhead of distributing work units: workers with GPUs in name only, and units that sleep."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console

from shortv.bench.rows import Row
from shortv.bench.specs import TINY, SchedulingBench
from shortv.plan import Mode
from shortv.records import LcRecord, UsedSample
from shortv.sample import Sample
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.cluster import start
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.measure import Measured, SweepEngine
from shortv.workers.sweep.spec import SweepSpec


@dataclass(frozen=True, kw_only=True)
class SleepEngine(SweepEngine):
    """An engine without a model: each unit sleeps, and each sample has made-up rows."""

    seconds: float = 0.0

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> str:
        """Load nothing."""
        return "loaded"

    def load_preprocessor(self, spec: ModelSpec) -> str:
        """Load nothing."""
        return "preprocessor"

    def preprocess(self, preprocessor: Any, samples: Sequence[Sample], *, alone: bool) -> bytes:
        """Return the names of the samples."""
        return " ".join(sample.sample_id for sample in samples).encode()

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
        """Sleep, and return a divergence for every sample, mode and layer."""
        time.sleep(self.seconds)
        return Measured(
            records=tuple(self.record(sample, mode, layer) for sample in samples for mode in modes for layer in layers),
            used=tuple(map(used, samples)),
        )

    def noise_floor(self, loaded: Any, inputs: bytes, full_BV: Any = None) -> float:
        """Return a floor that grows with the batch."""
        return 1e-9 * len(inputs.split())

    def record(self, sample: Sample, mode: Mode, layer: int) -> LcRecord:
        """Return a divergence that grows with the layer."""
        value, name = 1.0 + layer, sample.sample_id
        return LcRecord(
            sample_id=name, mode=mode, layer=layer, kl_full_ablated=value, kl_ablated_full=value, top1_changed=False
        )


def used(sample: Sample) -> UsedSample:
    """Return the row of a used sample, with made-up numbers of tokens."""
    return UsedSample(
        sample_id=sample.sample_id,
        dataset=sample.dataset,
        prompt=sample.prompt,
        answer=sample.answer,
        n_text=5,
        n_visual=4 * len(sample.images),
    )


@dataclass(frozen=True, kw_only=True)
class TracedEngine(SleepEngine):
    """Records when each unit ran, and in which process."""

    trace: Path

    def measure(self, *batch: Any, **options: Any) -> Measured:
        """Sleep, and leave a file. One machine has one monotonic clock for all processes."""
        started = time.monotonic()
        measured = super().measure(*batch, **options)
        span = {"worker": os.getpid(), "started": started, "ended": time.monotonic()}
        (self.trace / f"{os.getpid()}-{started}.json").write_text(json.dumps(span))
        return measured


def bench(spec: SchedulingBench) -> Iterator[Row]:
    """Sweep so many units per worker on each number of workers, which each have a GPU in name.

    Counted from the moment when the last worker began its first unit, so the start of workers is left out; the
    baseline is the time for which a worker slept on average.
    """
    for workers in spec.workers:
        spans = _sweep(workers, workers * spec.units, spec.unit_seconds)
        first: dict[float, float] = {}
        for span in spans:
            first[span["worker"]] = min(span["started"], first.get(span["worker"], span["started"]))
        begin, end = max(first.values()), max(span["ended"] for span in spans)
        busy = sum(max(0.0, span["ended"] - max(span["started"], begin)) for span in spans) / workers
        yield Row(
            case=f"{len(spans)} units of {spec.unit_seconds:g} s on {workers} workers",
            baseline_ms=1e3 * busy,
            measured_ms=1e3 * (end - begin),
            ratio=(end - begin) / busy,
            figures={"workers": workers, "of_ideal": busy / (end - begin)},
        )


def _sweep(workers: int, units: int, seconds: float) -> list[dict[str, float]]:
    """Run a sweep of one sample per unit and return when each unit ran."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        trace, calibration = Path(folder, "trace"), Path(folder, "calibration.parquet")
        trace.mkdir()
        rows = [{"sample_id": f"s{number:04d}", "images": [b"-"], "prompt": "?"} for number in range(units)]
        pq.write_table(pa.Table.from_pylist(rows), calibration)
        request = SweepSpec(
            model=str(TINY / "model"),
            calibration=(str(calibration),),
            output_path=str(Path(folder, "out")),
            modes=(Mode.FREEZE_VISUAL,),
            batch_size=1,
            workers=WorkerRange(workers, workers),
        )
        start(num_cpus=1, num_gpus=workers, log_to_driver=False, logging_level="ERROR")
        try:
            engine = TracedEngine(seconds=seconds, trace=trace)
            run_sweep(request, engine=engine, console=Console(file=io.StringIO()))
        finally:
            ray.shutdown()
        return [json.loads(path.read_text()) for path in trace.iterdir()]
