"""An engine without a model: numbers from names, and every way in which a real one fails."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from reports.store import Folder
from shortv.architecture import Architecture
from shortv.bench.scheduling import SleepEngine
from shortv.plan import Mode
from shortv.records import ErrorRecord, LcRecord
from shortv.sample import Sample
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.models import RemoteModel
from shortv.workers.sweep.driver import Prepared
from shortv.workers.sweep.measure import Measured, SweepEngine
from shortv.workers.sweep.pipeline import unit_input
from shortv.workers.sweep.spec import SweepSpec
from shortv.workers.sweep.units import Unit
from shortv.workers.sweep.worker import Attempts, MeasuringStage, PreparingStage, WorkerSetup
from tests.architectures import architecture

LAYERS = 6
MODES = (Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT)


@dataclass(frozen=True, kw_only=True)
class FakeEngine(SleepEngine):
    """Measures by hashing; samples named in a field fail in that field's way."""

    kills_once: Path | None = None
    """A file; the process that makes it kills itself."""
    kills: frozenset[str] = frozenset()
    raises: frozenset[str] = frozenset()
    unusable: frozenset[str] = frozenset()
    most_samples: int = 10**6
    preparing_kills: frozenset[str] = frozenset()
    broken: bool = False
    dies_loading: bool = False

    def describe(self, spec: ModelSpec) -> Architecture:
        return architecture(num_layers=LAYERS)

    def pin(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> str:
        if self.dies_loading:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken:
            raise OSError("no file named model.safetensors")
        return super().load(spec, device=device, threads=threads)

    def preprocess(self, preprocessor: Any, samples: Sequence[Sample], *, alone: bool) -> bytes:
        if {sample.sample_id for sample in samples} & self.preparing_kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().preprocess(preprocessor, samples, alone=alone)

    def measure(self, loaded: Any, samples: Sequence[Sample], inputs: bytes, **options: Any) -> Measured:
        assert loaded == "loaded" and inputs.decode().split() == [sample.sample_id for sample in samples]
        if self.kills_once and not self.kills_once.exists():
            self.kills_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        names = {sample.sample_id for sample in samples}
        if names & self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if names & self.raises:
            raise RuntimeError(f"cannot run {min(names & self.raises)}\nand a second line")
        if len(samples) > self.most_samples:
            raise MemoryError
        good = [sample for sample in samples if sample.sample_id not in self.unusable]
        errors = tuple(
            ErrorRecord(sample_id=name, stage="decode", error="fake", message="unusable")
            for name in (sample.sample_id for sample in samples)
            if name in self.unusable
        )
        return replace(super().measure(loaded, good, inputs, **options), errors=errors)

    def noise_floor(self, loaded: Any, inputs: bytes, full_BV: Any = None) -> float:
        if len(inputs.split()) > self.most_samples:
            raise MemoryError
        return super().noise_floor(loaded, inputs, full_BV)

    def record(self, sample: Sample, mode: Mode, layer: int) -> LcRecord:
        return record(sample, mode, layer)


def record(sample: Sample, mode: Mode, layer: int) -> LcRecord:
    digest = hashlib.sha256(f"{sample.sample_id} {mode} {layer}".encode()).digest()
    value = (layer + 1) * (1 + digest[0] / 256) if sample.images else 0.0
    return LcRecord(
        sample_id=sample.sample_id,
        mode=mode,
        layer=layer,
        kl_full_ablated=value,
        kl_ablated_full=2 * value,
        top1_changed=bool(digest[1] % 2),
    )


def make_samples(count: int) -> list[Sample]:
    """Samples s00, s01, ...; every fifth has no image."""
    return [
        Sample(sample_id=f"s{number:02d}", images=() if number % 5 == 4 else (b"image",), prompt=f"question {number}")
        for number in range(count)
    ]


def write_calibration(path: Path, samples: Sequence[Sample]) -> str:
    """Write a calibration file and return its path."""
    rows = [{"sample_id": one.sample_id, "images": list(one.images), "prompt": one.prompt} for one in samples]
    schema = pa.schema([("sample_id", pa.string()), ("images", pa.list_(pa.binary())), ("prompt", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def make_spec(folder: Path, *, samples: int = 12, workers: int = 2, **fields: Any) -> SweepSpec:
    """A fake sweep into `folder / "out"`."""
    folder.mkdir(exist_ok=True)
    calibration = write_calibration(folder / "calibration.parquet", make_samples(samples))
    return SweepSpec(
        model="fake/model",
        calibration=(calibration,),
        output_path=str(folder / "out"),
        batch_size=fields.pop("batch_size", 2),
        workers=WorkerRange(workers, workers),
        **fields,
    )


def run_unit(unit: Unit, samples: Sequence[Sample], engine: SweepEngine, attempts: Attempts | None = None) -> pa.Table:
    """Both stages of a sweep in this process; returns the finished unit."""
    setup = WorkerSetup(
        engine=engine,
        model=RemoteModel(loader=engine, spec=ModelSpec(name="fake/model"), folder=None),
        device="cpu",
        threads=1,
        modes=MODES,
        stack=None,
        attempts=attempts or Attempts(),
    )
    return MeasuringStage(setup)(PreparingStage(setup)(unit_input(unit, samples)))


def run_units_here(prepared: Prepared, console: Any) -> dict[str, Any]:
    """`driver.run_units` without Ray."""
    for unit in prepared.units(workers=1):
        prepared.commit(unit.unit_id, run_unit(unit, prepared.batches[unit.batch], prepared.engine))
    return {}


def tables(output: Path | str) -> dict[str, list[dict[str, Any]]]:
    """All rows of a finished sweep folder."""
    folder = Folder(str(output))
    found = {name: folder.read_table(name).to_pylist() for name in ("samples", "lc_layers", "errors")}
    return {**found, "lc_samples": folder.read_tables("lc_samples").to_pylist()}
