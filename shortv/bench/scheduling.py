"""Overhead of distributing work units: workers with GPUs in name only, and units that sleep."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console

from shortv.architecture import Architecture
from shortv.families import load_architecture
from shortv.plan import Mode
from shortv.records import LcRecord, UsedSample
from shortv.sample import Sample
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.cluster import start
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.measure import Measured, SweepEngine
from shortv.workers.sweep.spec import SweepSpec


class Scheduling(NamedTuple):
    """Units of a sweep, its seconds, and the share of the workers' time that they spent in units.

    Counted from the moment when the last worker began its first unit, so the start of workers is left out.
    """

    workers: int
    units: int
    seconds: float
    efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepEngine(SweepEngine):
    """An engine without a model: each unit sleeps and records when it ran."""

    architecture: Architecture
    unit_seconds: float
    trace: Path

    def describe(self, spec: ModelSpec) -> Architecture:
        """Return the sizes of the bundled model."""
        return self.architecture

    def pin(self, spec: ModelSpec) -> ModelSpec:
        """Return the model as it is."""
        return spec

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> str:
        """Load nothing."""
        return "nothing"

    def load_preprocessor(self, spec: ModelSpec) -> str:
        """Load nothing."""
        return "nothing"

    def preprocess(self, preprocessor: Any, samples: Sequence[Sample], *, alone: bool) -> bytes:
        """Prepare nothing."""
        return b""

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
        started = time.monotonic()
        time.sleep(self.unit_seconds)
        # One machine has one monotonic clock for all processes.
        span = {"worker": os.getpid(), "started": started, "ended": time.monotonic()}
        (self.trace / f"{os.getpid()}-{started}.json").write_text(json.dumps(span))
        return Measured(
            records=tuple(
                LcRecord(
                    sample_id=sample.sample_id,
                    mode=mode,
                    layer=layer,
                    kl_full_ablated=1.0 + layer,
                    kl_ablated_full=1.0 + layer,
                    top1_changed=False,
                )
                for sample in samples
                for mode in modes
                for layer in layers
            ),
            used=tuple(
                UsedSample(sample_id=one.sample_id, dataset=None, prompt=one.prompt, answer=None, n_text=1, n_visual=1)
                for one in samples
            ),
            noise_floor=0.0,
        )


def bench_scheduling(model: str, workers: int, *, units_each: int, unit_seconds: float) -> Scheduling:
    """Sweep `units_each` units per worker on `workers` workers that each have a GPU in name."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        trace = Path(folder, "trace")
        trace.mkdir()
        engine = SleepEngine(architecture=load_architecture(model), unit_seconds=unit_seconds, trace=trace)
        start(num_cpus=1, num_gpus=workers, log_to_driver=False, logging_level="ERROR")
        try:
            request = _request(Path(folder), workers, workers * units_each)
            run_sweep(request, engine=engine, console=Console(file=io.StringIO()))
        finally:
            ray.shutdown()
        spans = [json.loads(path.read_text()) for path in trace.iterdir()]
    return _scheduling(workers, spans)


def _request(folder: Path, workers: int, units: int) -> SweepSpec:
    calibration = folder / "calibration.parquet"
    rows = [{"sample_id": f"s{number:04d}", "images": [b"-"], "prompt": "?"} for number in range(units)]
    schema = pa.schema([("sample_id", pa.string()), ("images", pa.list_(pa.binary())), ("prompt", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), calibration)
    return SweepSpec(
        model="sleep",
        calibration=(str(calibration),),
        output_path=str(folder / "out"),
        modes=(Mode.FREEZE_VISUAL,),
        batch_size=1,
        workers=WorkerRange(workers, workers),
    )


def _scheduling(workers: int, spans: Sequence[dict[str, float]]) -> Scheduling:
    first: dict[float, float] = {}
    for span in spans:
        first[span["worker"]] = min(span["started"], first.get(span["worker"], span["started"]))
    begin, end = max(first.values()), max(span["ended"] for span in spans)
    busy = sum(max(0.0, span["ended"] - max(span["started"], begin)) for span in spans)
    return Scheduling(workers, len(spans), end - begin, busy / (workers * (end - begin)))
