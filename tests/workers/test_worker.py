"""One worker without Ray: what it does with samples that fail, and with deaths that the ledger remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortv.workers.ledger import LOADING, WHOLE, Ledger
from shortv.workers.models import Environment, RemoteModel
from shortv.workers.outcome import UnitResult
from shortv.workers.stream import write_units
from shortv.workers.units import Unit
from shortv.workers.worker import SweepWorker, WorkerSetup
from tests.workers.fakes import LAYERS, FakeEngine, make_request, make_samples

UNIT = Unit(0, 0, LAYERS)


def run(folder: Path, engine: FakeEngine, ledger: Ledger | None = None, samples: int = 4) -> UnitResult:
    from pyarrow import parquet as pq

    request = make_request(folder)
    setup = WorkerSetup(
        engine=engine,
        model=RemoteModel(loader=engine, spec=request.model, folder=None),
        device="cpu",
        threads=1,
        modes=request.modes,
        stack=None,
        ledger=ledger or Ledger(str(folder / "ledger.json")),
    )
    (path,) = write_units(folder, [UNIT], [make_samples(samples)])
    (text,) = SweepWorker(setup)(pq.read_table(path)).column("result").to_pylist()
    return UnitResult.from_json(json.loads(text))


def test_memory_is_halved_down_to_single_samples(tmp_path: Path) -> None:
    whole = run(tmp_path, FakeEngine())
    for most in (1, 2, 3):
        assert run(tmp_path, FakeEngine(most_samples=most)).measured == whole.measured
    alone = run(tmp_path, FakeEngine(most_samples=0)).measured
    assert [row.error for row in alone.errors] == ["out-of-memory"] * 4 and not alone.records


def test_an_exception_stays_with_its_sample(tmp_path: Path) -> None:
    measured = run(tmp_path, FakeEngine(raises=frozenset({"s02"}))).measured
    assert [(row.sample_id, row.error) for row in measured.errors] == [("s02", "RuntimeError")]
    assert {row.sample_id for row in measured.used} == {"s00", "s01", "s03"}


def test_a_batch_that_died_twice_runs_alone_and_names_the_sample_that_dies_a_third_time(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "counts.json"))
    for process, doing in enumerate([WHOLE, WHOLE, "sample s01"]):
        ledger.begin(UNIT.unit_id, f"{process}@dead")
        ledger.enter(UNIT.unit_id, doing)
    # A ledger that comes back after its own death has not forgotten.
    measured = run(tmp_path, FakeEngine(most_samples=1), Ledger(str(tmp_path / "counts.json"))).measured
    assert [(row.sample_id, row.error) for row in measured.errors] == [("s01", "process-died")]
    assert len(measured.used) == 3


def test_deaths_while_loading_end_the_sweep_and_no_sample(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "counts.json"))
    for process in range(3):
        ledger.begin(UNIT.unit_id, f"{process}@dead")
        ledger.enter(UNIT.unit_id, LOADING)
    assert "died while loading" in (run(tmp_path, FakeEngine(), ledger).fatal or "")


def test_a_living_process_that_asks_again_did_not_die(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "counts.json"))
    for _ in range(3):
        deaths = ledger.begin(UNIT.unit_id, "1@same")
        ledger.enter(UNIT.unit_id, WHOLE)
    assert deaths == {LOADING: 0}


def test_a_model_that_cannot_be_loaded_is_fatal(tmp_path: Path) -> None:
    assert "model.safetensors" in (run(tmp_path, FakeEngine(broken=True)).fatal or "")


def test_secrets_for_workers_are_never_shown() -> None:
    assert "hf_secret" not in repr(Environment({"HF_TOKEN": "hf_secret"})) + str(Environment(HF_TOKEN="hf_secret"))


@pytest.mark.parametrize("samples", [1, 4])
def test_results_keep_every_digit(tmp_path: Path, samples: int) -> None:
    result = run(tmp_path, FakeEngine(), samples=samples)
    assert UnitResult.from_json(json.loads(result.to_json())) == result
