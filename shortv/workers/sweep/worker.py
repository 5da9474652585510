"""The two stages of a sweep's pipeline. Every failure becomes the error row of one sample.

`PreparingStage` decodes images and runs the processor on CPUs, without weights. `MeasuringStage` holds the model and
measures. Neither trusts its own process to survive: see `attempts`.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shortv.errors import SampleError, ShortVError, one_line
from shortv.plan import Mode
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.models import RemoteModel, is_out_of_memory
from shortv.workers.samples import samples_of
from shortv.workers.sweep.attempts import LOADING, MAX_DEATHS, MAX_WHOLE_DEATHS, WHOLE, Attempts, RemoteAttempts
from shortv.workers.sweep.measure import Measured, SweepEngine, UnitResult
from shortv.workers.sweep.units import Unit

PREPARING = "preparing"
NOISE = "the noise floor"
# Errors after which a CUDA process can compute nothing any more.
_POISONED = ("AcceleratorError", "CudaError")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """What every process of a sweep is given once."""

    engine: SweepEngine
    model: RemoteModel
    device: str
    threads: int
    modes: tuple[Mode, ...]
    stack: int | None
    attempts: Attempts | RemoteAttempts


class PreparingStage:
    """Prepares the inputs of one unit per call.

    Where that fails as a whole, or has killed its process twice, the unit goes on without inputs: the measuring stage
    then prepares them itself and finds the sample that is at fault.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        """Take the setup; nothing is loaded yet."""
        self._setup = setup
        self._preprocessor: Any = None
        self._name = _process_name()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the column `inputs` to a unit."""
        (row,) = table.to_pylist()
        inputs = self._inputs(Unit.parse(row["unit_id"]), samples_of(row["samples"]))
        return table.append_column(pa.field("inputs", pa.large_binary()), pa.array([inputs], pa.large_binary()))

    def _inputs(self, unit: Unit, samples: Sequence[Sample]) -> bytes | None:
        attempts, key = self._setup.attempts, f"{PREPARING} {unit.unit_id}"
        if attempts.begin(key, self._name).get(PREPARING, 0) >= MAX_WHOLE_DEATHS:
            attempts.end(key)
            return None
        attempts.enter(key, PREPARING)
        try:
            if self._preprocessor is None:
                self._preprocessor = self._setup.model.load_preprocessor()
            return self._setup.engine.preprocess(self._preprocessor, samples, alone=0 in unit.layers)
        except Exception:  # the measuring stage meets it again and says whose it is
            return None
        finally:
            attempts.end(key)


class MeasuringStage:
    """Measures one unit per call; the model is loaded in the first call, because Ray Data gives up on constructors."""

    def __init__(self, setup: WorkerSetup) -> None:
        """Take the setup; nothing is loaded yet."""
        self._setup = setup
        self._loaded: Any = None
        self._name = _process_name()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Measure a unit; the result is a table of one row."""
        (row,) = table.to_pylist()
        return self._run(row["unit_id"], samples_of(row["samples"]), row["inputs"]).to_table()

    def _run(self, unit_id: str, samples: Sequence[Sample], inputs: bytes | None) -> UnitResult:
        started = time.monotonic()
        attempts = self._setup.attempts
        deaths = attempts.begin(unit_id, self._name)
        try:
            self._load(unit_id, deaths)
        except ShortVError as error:
            attempts.end(unit_id)
            return UnitResult(unit_id=unit_id, measured=Measured(), fatal=one_line(error))
        measured = self._guarded(unit_id, samples, inputs, deaths)
        attempts.end(unit_id)
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
        setup.attempts.enter(unit_id, LOADING)
        self._loaded = setup.model.load(device=setup.device, threads=setup.threads)
        setup.attempts.loaded()

    def _guarded(
        self, unit_id: str, samples: Sequence[Sample], inputs: bytes | None, deaths: Mapping[str, int]
    ) -> Measured:
        """Measure a batch whole, or one by one when processes died with it twice; then its noise floor."""
        attempts, layers = self._setup.attempts, Unit.parse(unit_id).layers
        if deaths.get(WHOLE, 0) < MAX_WHOLE_DEATHS:
            attempts.enter(unit_id, WHOLE)
            measured = self._measure(samples, layers, inputs)
        else:
            measured = Measured()
            for sample in samples:
                count = deaths[WHOLE] + deaths.get(_alone(sample), 0)
                if count >= MAX_DEATHS:
                    measured += Measured(errors=(_killer(sample, count),))
                    continue
                attempts.enter(unit_id, _alone(sample))
                measured += self._measure([sample], layers).without_floor()
        if measured.noise_floor is not None or 0 not in layers or deaths.get(NOISE, 0) >= MAX_WHOLE_DEATHS:
            return measured
        attempts.enter(unit_id, NOISE)
        used = {row.sample_id for row in measured.used}
        return measured + Measured(noise_floor=self._floor([one for one in samples if one.sample_id in used]))

    def _measure(self, samples: Sequence[Sample], layers: range, inputs: bytes | None = None) -> Measured:
        """Measure samples together; after a failure in halves or one by one, so that it stays with its sample."""
        setup = self._setup
        try:
            if inputs is None:
                inputs = setup.engine.preprocess(self._loaded, samples, alone=0 in layers)
            return setup.engine.measure(
                self._loaded, samples, inputs, layers=layers, modes=setup.modes, stack=setup.stack
            )
        except Exception as error:  # whatever the model's code raises is the sample's error, not the sweep's end
            _die_if_poisoned(error)
            failure = error
        if len(samples) == 1:
            return Measured(errors=(_error(samples[0], failure),))
        # Memory is freed here: the exception above held the tensors of its frames.
        step = (len(samples) + 1) // 2 if is_out_of_memory(failure) else 1
        del failure
        measured = Measured()
        for start in range(0, len(samples), step):
            measured += self._measure(samples[start : start + step], layers).without_floor()
        return measured

    def _floor(self, samples: Sequence[Sample]) -> float | None:
        """Return the noise floor of the samples that could be used, as one batch.

        It is the same whether they were measured together or, after deaths and failures, apart. A batch that does not
        fit into memory is halved.
        """
        try:
            return self._setup.engine.noise_floor(self._loaded, samples) if samples else None
        except Exception as error:  # a run without a noise floor is complete: only equal layers are ties
            _die_if_poisoned(error)
            if not is_out_of_memory(error) or len(samples) == 1:
                return None
        middle = (len(samples) + 1) // 2
        floors = [self._floor(samples[:middle]), self._floor(samples[middle:])]
        return max((floor for floor in floors if floor is not None), default=None)


def _process_name() -> str:
    return f"{os.getpid()}@{uuid.uuid4().hex}"


def _die_if_poisoned(error: Exception) -> None:
    if type(error).__name__ in _POISONED:
        os.kill(os.getpid(), signal.SIGKILL)


def _alone(sample: Sample) -> str:
    return f"sample {sample.sample_id}"


def _error(sample: Sample, error: Exception) -> ErrorRecord:
    if isinstance(error, SampleError):
        return ErrorRecord(sample_id=sample.sample_id, stage=error.stage, error=error.error, message=error.message)
    if is_out_of_memory(error):
        message = "one ablation of this sample alone needs more memory than the device has"
        return ErrorRecord(sample_id=sample.sample_id, stage="measure", error="out-of-memory", message=message)
    message = f"{type(error).__name__}: {one_line(error)}"
    return ErrorRecord(sample_id=sample.sample_id, stage="measure", error=type(error).__name__, message=message)


def _killer(sample: Sample, count: int) -> ErrorRecord:
    message = f"{count} worker processes died while measuring this sample, the last one with this sample alone"
    return ErrorRecord(sample_id=sample.sample_id, stage="measure", error="process-died", message=message)
