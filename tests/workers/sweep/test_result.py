"""The tables hold each sample exactly once, and say so when one is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.manifest import SweepManifest
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.workers.sweep import driver
from shortv.workers.sweep.result import finish
from shortv.workers.sweep.units import Unit
from tests.workers.fakes import LAYERS, MODES, FakeEngine, make_samples, make_spec, run_unit


def result_of(folder: Path, first: FakeEngine, second: FakeEngine, *, lost: int = 0) -> SweepManifest:
    """Finish a sweep of five samples in two units; the second measures some samples less."""
    prepared = driver.prepare(make_spec(folder, samples=5, batch_size=5), FakeEngine())
    for unit, engine, count in ((Unit(0, 0, 2), first, 5), (Unit(0, 2, LAYERS), second, 5 - lost)):
        prepared.commit(unit.unit_id, run_unit(unit, make_samples(count), engine))
    assert prepared.units(workers=1) == []
    return finish(prepared.folder, prepared.manifest)


def test_an_error_in_one_unit_takes_the_sample_out_of_all(tmp_path: Path) -> None:
    manifest = result_of(tmp_path, FakeEngine(), FakeEngine(raises=frozenset({"s01"})))
    assert manifest.counts == {"samples": 5, "used": 4, "errors": 1, "without_image": 1}
    assert manifest.noise_floor == pytest.approx(5e-9)
    folder = Folder(str(tmp_path / "out"))
    used = folder.read_table("samples")["sample_id"].to_pylist()
    assert used == ["s00", "s02", "s03", "s04"]
    assert folder.read_table("errors")["sample_id"].to_pylist() == ["s01"]
    rows = folder.read_tables("lc_samples").to_pylist()
    keys = [(row["sample_id"], row["mode"], row["layer"]) for row in rows]
    assert keys == [(name, mode, layer) for name in used for mode in MODES for layer in range(LAYERS)]
    # The fifth sample has no image, so it does not count for a visual mode.
    layers = folder.read_table("lc_layers").to_pylist()
    assert {row["mode"]: row["n"] for row in layers} == {"freeze-visual": 3, "freeze-text": 4}


def test_without_a_used_sample_there_is_no_result(tmp_path: Path) -> None:
    every = frozenset(sample.sample_id for sample in make_samples(5))
    with pytest.raises(ShortVError, match="none of the 5 samples could be used; the first, 's00'"):
        result_of(tmp_path, FakeEngine(), FakeEngine(raises=every))


def test_a_lost_sample_is_never_silent(tmp_path: Path) -> None:
    with pytest.raises(ShortVError, match="'s04' was lost"):
        result_of(tmp_path, FakeEngine(), FakeEngine(), lost=1)
