"""The actor that measures units: one copy of the model per process, every failure turned into a row."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shortv.errors import SampleError, ShortVError
from shortv.plan import Mode
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.engine import SweepEngine
from shortv.workers.ledger import LOADING, MAX_DEATHS, MAX_WHOLE_DEATHS, WHOLE, Attempter
from shortv.workers.models import RemoteModel
from shortv.workers.outcome import Measured, UnitResult
from shortv.workers.units import Unit

RESULT_SCHEMA = pa.schema([pa.field("result", pa.string(), nullable=False)])
_HUB = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")
# Errors after which a CUDA process can compute nothing any more.
_POISONED = ("AcceleratorError", "CudaError")


class Environment(dict[str, str]):
    """Environment variables for workers that never show their values."""

    def __repr__(self) -> str:
        return f"Environment({', '.join(self)})"

    __str__ = __repr__


def hub_environment() -> Environment:
    """What this process knows of the hub, for workers on other nodes."""
    return Environment({name: os.environ[name] for name in _HUB if name in os.environ})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Everything a worker process is told once."""

    engine: SweepEngine
    model: RemoteModel
    device: str
    threads: int
    modes: tuple[Mode, ...]
    stack: int | None
    ledger: Attempter


class SweepWorker:
    """Measures one unit per call; the model is loaded in the first call, because Ray Data gives up on constructors."""

    def __init__(self, setup: WorkerSetup) -> None:
        """Take the setup; nothing is loaded yet."""
        self._setup = setup
        self._loaded: Any = None
        self._name = f"{os.getpid()}@{uuid.uuid4().hex}"

    def __call__(self, table: pa.Table) -> pa.Table:
        """Measure the unit of each row; one result row each, as JSON text."""
        results = [self._run(row["unit_id"], _samples(row)).to_json() for row in table.to_pylist()]
        return pa.table({"result": results}, schema=RESULT_SCHEMA)

    def _run(self, unit_id: str, samples: Sequence[Sample]) -> UnitResult:
        started = time.monotonic()
        ledger = self._setup.ledger
        deaths = ledger.begin(unit_id, self._name)
        try:
            self._load(unit_id, deaths)
        except ShortVError as error:
            ledger.end(unit_id)
            return UnitResult(unit_id=unit_id, measured=Measured(), fatal=str(error))
        measured = self._guarded(unit_id, samples, deaths)
        ledger.end(unit_id)
        return UnitResult(unit_id=unit_id, measured=measured, seconds=time.monotonic() - started)

    def _load(self, unit_id: str, deaths: Mapping[str, int]) -> None:
        """Load the model unless it is there; raises ShortVError when it cannot be loaded."""
        if self._loaded is not None:
            return
        setup = self._setup
        if deaths[LOADING] >= MAX_DEATHS:
            raise ShortVError(
                f"{deaths[LOADING]} worker processes in a row died while loading {setup.model.spec.name!r}; "
                "it may need more memory than a worker's node has free"
            )
        setup.ledger.enter(unit_id, LOADING)
        self._loaded = setup.model.load(device=setup.device, threads=setup.threads)
        setup.ledger.loaded()

    def _guarded(self, unit_id: str, samples: Sequence[Sample], deaths: Mapping[str, int]) -> Measured:
        """Measure a batch whole, or one by one when processes died with it twice."""
        layers = Unit.parse(unit_id).layers
        if deaths.get(WHOLE, 0) < MAX_WHOLE_DEATHS:
            self._setup.ledger.enter(unit_id, WHOLE)
            return self._measure(samples, layers)
        measured = Measured()
        for sample in samples:
            count = deaths[WHOLE] + deaths.get(_alone(sample), 0)
            if count >= MAX_DEATHS:
                measured += Measured(errors=(_killer(sample, count),))
                continue
            self._setup.ledger.enter(unit_id, _alone(sample))
            measured += self._measure([sample], layers)
        return measured

    def _measure(self, samples: Sequence[Sample], layers: range) -> Measured:
        """Measure samples together; after a failure in halves or one by one, so that it stays with its sample."""
        setup = self._setup
        try:
            return setup.engine.measure(self._loaded, samples, layers=layers, modes=setup.modes, stack=setup.stack)
        except Exception as error:  # whatever the model's code raises is the sample's error, not the sweep's end
            if type(error).__name__ in _POISONED:
                os.kill(os.getpid(), signal.SIGKILL)
            failure = error
        if len(samples) == 1:
            return Measured(errors=(_error(samples[0], failure),))
        # Memory is freed here: the exception above held the tensors of its frames.
        step = (len(samples) + 1) // 2 if is_out_of_memory(failure) else 1
        del failure
        measured = Measured()
        for start in range(0, len(samples), step):
            measured += self._measure(samples[start : start + step], layers)
        return measured


def _alone(sample: Sample) -> str:
    return f"sample {sample.sample_id}"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that fewer samples at a time may help."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _error(sample: Sample, error: Exception) -> ErrorRecord:
    if isinstance(error, SampleError):
        return ErrorRecord(sample_id=sample.sample_id, stage=error.stage, error=error.error, message=error.message)
    if is_out_of_memory(error):
        message = "one ablation of this sample alone needs more memory than the device has"
        return ErrorRecord(sample_id=sample.sample_id, stage="measure", error="out-of-memory", message=message)
    return ErrorRecord(sample_id=sample.sample_id, stage="measure", error=type(error).__name__, message=_short(error))


def _killer(sample: Sample, count: int) -> ErrorRecord:
    message = f"{count} worker processes died while measuring this sample, the last one with this sample alone"
    return ErrorRecord(sample_id=sample.sample_id, stage="measure", error="process-died", message=message)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _samples(row: Mapping[str, Any]) -> list[Sample]:
    return [Sample(**{**value, "images": tuple(value["images"])}) for value in row["samples"]]
