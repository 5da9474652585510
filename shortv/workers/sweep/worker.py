"""The two stages of a sweep's pipeline. Every failure becomes the error row of one sample.

`PreparingStage` decodes images and runs the processor on CPUs, without weights. `MeasuringStage` holds the model and
measures. Neither trusts its own process to survive: Ray Data retries the task of a dead process for ever and without
a record. A worker therefore notes in `Attempts`, outside its process, what it is about to do, and the next process that
gets the same unit finds an attempt that never ended.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shortv.errors import SampleError, ShortVError, one_line
from shortv.plan import Mode
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.models import RemoteModel, is_out_of_memory
from shortv.workers.samples import samples_of
from shortv.workers.sweep.measure import Measured, SweepEngine, unit_table
from shortv.workers.sweep.units import Unit

PREPARING = "preparing"
LOADING = "loading the model"
WHOLE = "the whole batch"
NOISE = "the noise floor"
MAX_DEATHS = 3
"""Deaths after which a sample, or the loading of the model, is given up."""
MAX_WHOLE_DEATHS = MAX_DEATHS - 1
"""Deaths of a batch after which its samples are run one by one."""
# Errors after which a CUDA process can compute nothing any more.
_POISONED = ("AcceleratorError", "CudaError")


class Attempts:
    """What each worker is doing, and the deaths of workers by unit and by what they were doing."""

    def __init__(self) -> None:
        """Start without any deaths."""
        self._deaths: dict[str, Counter[str]] = defaultdict(Counter)
        self._open: dict[str, tuple[str, str | None]] = {}
        self._loading_deaths = 0

    def begin(self, unit_id: str, worker: str) -> dict[str, int]:
        """Open an attempt at a unit; returns its deaths so far by what was being done, those of loading in a row.

        An attempt that is still open belongs to a process that died. No other process has the name `worker`.
        """
        deaths = self._deaths[unit_id]
        before, doing = self._open.get(unit_id, (worker, None))
        # A call that is repeated after the restart of this actor comes from the same living process.
        if before != worker and doing == LOADING:
            self._loading_deaths += 1
        elif before != worker and doing is not None:
            deaths[doing] += 1
        self._open[unit_id] = (worker, None)
        return {**deaths, LOADING: self._loading_deaths}

    def enter(self, unit_id: str, doing: str | None) -> None:
        """Note what the open attempt does from now on; with None it ends, and its result is on the way."""
        worker, before = self._open.pop(unit_id, ("", None))
        if before == LOADING:
            # The deaths before a process that has loaded the model were not the model's fault.
            self._loading_deaths = 0
        if doing is None:
            self._deaths.pop(unit_id, None)
        else:
            self._open[unit_id] = (worker, doing)


class RemoteAttempts(Attempts):
    """The same on an actor of the driver's node, which takes no CPU; each call is waited for."""

    def __init__(self) -> None:
        """Start the actor. When it dies a new one counts from zero: the sweep goes on, and takes longer."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._actor: Any = ray.remote(**options)(Attempts).remote()

    def begin(self, unit_id: str, worker: str) -> dict[str, int]:
        deaths: dict[str, int] = ray.get(self._actor.begin.remote(unit_id, worker))
        return deaths

    def enter(self, unit_id: str, doing: str | None) -> None:
        ray.get(self._actor.enter.remote(unit_id, doing))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """What every process of a sweep is given once."""

    engine: SweepEngine
    model: RemoteModel
    device: str
    threads: int
    modes: tuple[Mode, ...]
    stack: int | None
    attempts: Attempts


class PreparingStage:
    """Prepares the inputs of one unit per call.

    Where that fails as a whole, or has killed its process twice, the unit goes on without inputs: the measuring stage
    then prepares them itself and finds the sample that is at fault.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        """Take the setup; nothing is loaded yet."""
        self._setup = setup
        self._preprocessor: Any = None
        self._name = uuid.uuid4().hex

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the column `inputs` to a unit."""
        (row,) = table.to_pylist()
        attempts, key = self._setup.attempts, f"{PREPARING} {row['unit_id']}"
        inputs = None
        if attempts.begin(key, self._name).get(PREPARING, 0) < MAX_WHOLE_DEATHS:
            attempts.enter(key, PREPARING)
            inputs = self._inputs(Unit.parse(row["unit_id"]), samples_of(row["samples"]))
        attempts.enter(key, None)
        return table.append_column("inputs", pa.array([inputs], pa.large_binary()))

    def _inputs(self, unit: Unit, samples: Sequence[Sample]) -> bytes | None:
        try:
            if self._preprocessor is None:
                self._preprocessor = self._setup.model.load_preprocessor()
            return self._setup.engine.preprocess(self._preprocessor, samples, alone=0 in unit.layers)
        except Exception:  # the measuring stage meets it again and says whose it is
            return None


class MeasuringStage:
    """Measures one unit per call; the model is loaded in the first call, because Ray Data gives up on constructors."""

    def __init__(self, setup: WorkerSetup) -> None:
        """Take the setup; nothing is loaded yet."""
        self._setup = setup
        self._loaded: Any = None
        self._name = uuid.uuid4().hex

    def __call__(self, table: pa.Table) -> pa.Table:
        """Measure a unit; the result is a table of one row."""
        (row,) = table.to_pylist()
        unit_id, samples, inputs = row["unit_id"], samples_of(row["samples"]), row["inputs"]
        layers, attempts = Unit.parse(unit_id).layers, self._setup.attempts
        deaths = attempts.begin(unit_id, self._name)
        try:
            self._load(unit_id, deaths)
        except ShortVError as error:
            result = unit_table(unit_id, Measured(), fatal=one_line(error))
        else:
            measured = self._guarded(unit_id, samples, layers, inputs, deaths)
            floor = None
            if 0 in layers and deaths.get(NOISE, 0) < MAX_WHOLE_DEATHS:
                attempts.enter(unit_id, NOISE)
                good = {row.sample_id for row in measured.used}
                used = [sample for sample in samples if sample.sample_id in good]
                whole = len(used) == len(samples)
                floor = self._floor(used, inputs if whole else None, measured.full_BV if whole else None)
            result = unit_table(unit_id, measured, noise_floor=floor)
        attempts.enter(unit_id, None)
        return result

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

    def _guarded(
        self, unit_id: str, samples: Sequence[Sample], layers: range, inputs: bytes | None, deaths: Mapping[str, int]
    ) -> Measured:
        """Measure a batch whole, or one by one when processes died with it twice."""
        enter = self._setup.attempts.enter
        if deaths.get(WHOLE, 0) < MAX_WHOLE_DEATHS:
            enter(unit_id, WHOLE)
            return self._measure(samples, layers, inputs)
        measured = Measured()
        for sample in samples:
            alone = f"sample {sample.sample_id}"
            count = deaths[WHOLE] + deaths.get(alone, 0)
            if count < MAX_DEATHS:
                enter(unit_id, alone)
                measured += self._measure([sample], layers)
            else:
                problem = f"{count} worker processes died while measuring this sample, the last one with it alone"
                measured += _failed(sample, "process-died", problem)
        return measured

    def _measure(self, samples: Sequence[Sample], layers: range, inputs: bytes | None = None) -> Measured:
        """Measure samples together; after a failure in halves or one by one, so that it stays with its sample."""
        setup = self._setup
        try:
            if inputs is None:
                inputs = setup.engine.preprocess(self._loaded, samples, alone=False)
            return setup.engine.measure(
                self._loaded, samples, inputs, layers=layers, modes=setup.modes, stack=setup.stack
            )
        except Exception as error:  # whatever the model's code raises is the sample's error, not the sweep's end
            _die_if_poisoned(error)
            if len(samples) == 1:
                return _error(samples[0], error)
            step = (len(samples) + 1) // 2 if is_out_of_memory(error) else 1
        # Memory is free only here: the exception above held the tensors of its frames.
        parts = (self._measure(samples[start : start + step], layers) for start in range(0, len(samples), step))
        return sum(parts, Measured())

    def _floor(self, samples: Sequence[Sample], inputs: bytes | None = None, full_BV: Any = None) -> float | None:
        """Return the noise floor of the samples that could be used, as one batch.

        It is the same whether they were measured together or, after deaths and failures, apart. A batch that does not
        fit into memory is halved.
        """
        if not samples:
            return None
        try:
            inputs = inputs or self._setup.engine.preprocess(self._loaded, samples, alone=True)
            return self._setup.engine.noise_floor(self._loaded, inputs, full_BV)
        except Exception as error:  # a run without a noise floor is complete: only equal layers are ties
            _die_if_poisoned(error)
            if not is_out_of_memory(error) or len(samples) == 1:
                return None
        middle = (len(samples) + 1) // 2
        floors = [self._floor(samples[:middle]), self._floor(samples[middle:])]
        return max((floor for floor in floors if floor is not None), default=None)


def _die_if_poisoned(error: Exception) -> None:
    if type(error).__name__ in _POISONED:
        os.kill(os.getpid(), signal.SIGKILL)


def _error(sample: Sample, error: Exception) -> Measured:
    if isinstance(error, SampleError):
        return _failed(sample, error.error, error.message, stage=error.stage)
    if is_out_of_memory(error):
        problem = "one ablation of this sample alone needs more memory than the device has"
        return _failed(sample, "out-of-memory", problem)
    return _failed(sample, type(error).__name__, f"{type(error).__name__}: {one_line(error)}")


def _failed(sample: Sample, error: str, message: str, *, stage: str = "measure") -> Measured:
    record = ErrorRecord(sample_id=sample.sample_id, stage=stage, error=error, message=message)
    return Measured(errors=(record,))
