"""The two stages without Ray: what they do with samples that fail, and with deaths that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shortv.workers.models import Environment, RemoteModel
from shortv.workers.samples import rows_of
from shortv.workers.sweep.attempts import LOADING, WHOLE, Attempts
from shortv.workers.sweep.measure import Measured, UnitResult
from shortv.workers.sweep.pipeline import UNIT_SCHEMA
from shortv.workers.sweep.units import Unit
from shortv.workers.sweep.worker import NOISE, PREPARING, MeasuringStage, PreparingStage, WorkerSetup
from tests.workers.fakes import LAYERS, FakeEngine, make_samples, make_spec

UNIT = Unit(0, 0, LAYERS)


def setup_of(folder: Path, engine: FakeEngine, attempts: Attempts | None = None) -> WorkerSetup:
    spec = make_spec(folder)
    return WorkerSetup(
        engine=engine,
        model=RemoteModel(loader=engine, spec=spec.model_spec(), folder=None),
        device="cpu",
        threads=1,
        modes=spec.modes,
        stack=None,
        attempts=attempts or Attempts(str(folder / "attempts.json")),
    )


def run(folder: Path, engine: FakeEngine, attempts: Attempts | None = None, samples: int = 4) -> UnitResult:
    setup = setup_of(folder, engine, attempts)
    row = {"unit_id": UNIT.unit_id, "samples": rows_of(make_samples(samples))}
    prepared = PreparingStage(setup)(pa.Table.from_pylist([row], schema=UNIT_SCHEMA))
    return UnitResult.from_table(MeasuringStage(setup)(prepared))


def died(path: Path, *doings: str) -> Attempts:
    """Counts of processes that died one after the other; they come back after the death of their own process."""
    attempts = Attempts(str(path))
    for process, doing in enumerate(doings):
        key = f"{PREPARING} {UNIT.unit_id}" if doing == PREPARING else UNIT.unit_id
        attempts.begin(key, f"{process}@dead")
        attempts.enter(key, doing)
    return Attempts(str(path))


def test_memory_is_halved_down_to_single_samples(tmp_path: Path) -> None:
    whole = run(tmp_path, FakeEngine()).measured
    for most, part in ((1, 1), (2, 2), (3, 2)):
        found = run(tmp_path, FakeEngine(most_samples=most)).measured
        assert found.without_floor() == whole.without_floor()
        # So is the batch of the noise floor, to the largest parts that fit.
        assert found.noise_floor == FakeEngine().noise_floor(None, make_samples(part))
    alone = run(tmp_path, FakeEngine(most_samples=0)).measured
    assert [row.error for row in alone.errors] == ["out-of-memory"] * 4 and not alone.records


def test_an_exception_stays_with_its_sample(tmp_path: Path) -> None:
    measured = run(tmp_path, FakeEngine(raises=frozenset({"s02"}))).measured
    assert [(row.sample_id, row.error) for row in measured.errors] == [("s02", "RuntimeError")]
    assert {row.sample_id for row in measured.used} == {"s00", "s01", "s03"}


def test_a_batch_that_died_twice_runs_alone_and_names_the_sample_that_dies_a_third_time(tmp_path: Path) -> None:
    attempts = died(tmp_path / "counts.json", WHOLE, WHOLE, "sample s01")
    measured = run(tmp_path, FakeEngine(most_samples=1), attempts).measured
    assert [(row.sample_id, row.error) for row in measured.errors] == [("s01", "process-died")]
    assert len(measured.used) == 3


def test_deaths_while_preparing_hand_the_unit_on(tmp_path: Path) -> None:
    attempts = died(tmp_path / "counts.json", PREPARING, PREPARING)
    # In the process that holds the weights the samples are prepared again, and found by the same rule.
    setup = setup_of(tmp_path, FakeEngine(preparing_kills=frozenset({"s01"})), attempts)
    row = {"unit_id": UNIT.unit_id, "samples": rows_of(make_samples(4))}
    table = PreparingStage(setup)(pa.Table.from_pylist([row], schema=UNIT_SCHEMA))
    assert table.column("inputs").to_pylist() == [None]


@dataclass(frozen=True, kw_only=True)
class Clumsy(FakeEngine):
    def preprocess(self, preprocessor: Any, samples: Any, *, alone: bool) -> bytes:
        if preprocessor == "preprocessor" or (len(samples) > 1 and any(one.sample_id == "s01" for one in samples)):
            raise RuntimeError("cannot prepare")
        return super().preprocess(preprocessor, samples, alone=alone)


def test_what_cannot_be_prepared_together_is_prepared_apart(tmp_path: Path) -> None:
    assert run(tmp_path, Clumsy()).measured == run(tmp_path, FakeEngine()).measured


def test_the_noise_floor_depends_on_the_samples_and_not_on_failures(tmp_path: Path) -> None:
    whole = run(tmp_path, FakeEngine()).measured.noise_floor
    assert whole is not None
    for number, doings in enumerate(([WHOLE], [WHOLE, WHOLE], [WHOLE, WHOLE, NOISE])):
        attempts = died(tmp_path / f"{number}.json", *doings)
        assert run(tmp_path, FakeEngine(), attempts).measured.noise_floor == whole, doings
    # A sample that always fails is not in the batch, however it was found out.
    raising = run(tmp_path, FakeEngine(raises=frozenset({"s02"}))).measured
    dying = run(tmp_path, FakeEngine(), died(tmp_path / "dying.json", WHOLE, WHOLE, "sample s02")).measured
    assert {row.sample_id for row in raising.errors} == {row.sample_id for row in dying.errors} == {"s02"}
    assert raising.noise_floor == dying.noise_floor == FakeEngine().noise_floor(None, make_samples(3))
    # A floor that kills its process twice is left out.
    assert (
        run(tmp_path, FakeEngine(), died(tmp_path / "n.json", WHOLE, WHOLE, NOISE, NOISE)).measured.noise_floor is None
    )


def test_deaths_while_loading_end_the_sweep_and_no_sample(tmp_path: Path) -> None:
    attempts = died(tmp_path / "counts.json", LOADING, LOADING, LOADING)
    assert "died while loading" in (run(tmp_path, FakeEngine(), attempts).fatal or "")


def test_a_living_process_that_asks_again_did_not_die(tmp_path: Path) -> None:
    attempts = Attempts(str(tmp_path / "counts.json"))
    for _ in range(3):
        deaths = attempts.begin(UNIT.unit_id, "1@same")
        attempts.enter(UNIT.unit_id, WHOLE)
    assert deaths == {LOADING: 0}


def test_a_model_that_cannot_be_loaded_is_fatal(tmp_path: Path) -> None:
    assert "model.safetensors" in (run(tmp_path, FakeEngine(broken=True)).fatal or "")


def test_secrets_for_workers_are_never_shown() -> None:
    assert "hf_secret" not in repr(Environment({"HF_TOKEN": "hf_secret"})) + str(Environment(HF_TOKEN="hf_secret"))


@pytest.mark.parametrize("samples", [1, 4])
def test_results_keep_every_digit(tmp_path: Path, samples: int) -> None:
    result = run(tmp_path, FakeEngine(), samples=samples)
    assert UnitResult.from_table(result.to_table()) == result
    assert UnitResult.from_table(UnitResult(unit_id="u", measured=Measured(), fatal="why").to_table()).fatal == "why"
