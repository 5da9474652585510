"""The tables hold each sample exactly once, and say so when one is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.store import Folder
from shortv.errors import ShortVError
from shortv.plan import Mode
from shortv.records import ErrorRecord, KlDirection
from shortv.workers.sweep.measure import Measured, UnitResult
from shortv.workers.sweep.tables import Parts, Tables, assemble, layer_records
from shortv.workers.sweep.units import Unit
from tests.workers.fakes import LAYERS, make_samples, record, used

MODES = (Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT)
SAMPLES = make_samples(5)


def keep(folder: Folder, unit: Unit, *, errors: tuple[str, ...] = (), lost: str | None = None) -> None:
    good = [sample for sample in SAMPLES if sample.sample_id not in (*errors, lost)]
    measured = Measured(
        records=tuple(record(sample, mode, layer) for sample in good for layer in unit.layers for mode in MODES),
        used=tuple(used(sample) for sample in good),
        errors=tuple(ErrorRecord(sample_id=name, stage="measure", error="e", message="m") for name in errors),
        noise_floor=0.5 if unit.first == 0 else None,
    )
    result = UnitResult(unit_id=unit.unit_id, measured=measured)
    Parts(folder).save(unit, result.to_table())


def run(folder: Folder) -> Tables:
    return assemble(
        folder,
        Parts(folder),
        [SAMPLES],
        modes=MODES,
        num_layers=LAYERS,
        kl_direction=KlDirection.FULL_ABLATED,
    )


def test_an_error_in_one_unit_takes_the_sample_out_of_all(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    keep(folder, Unit(0, 0, 2))
    keep(folder, Unit(0, 2, LAYERS), errors=("s01",))
    assert Parts(folder).finished() == {0: frozenset(range(LAYERS))}
    tables = run(folder)
    assert [row.sample_id for row in tables.used] == ["s00", "s02", "s03", "s04"]
    assert [row.sample_id for row in tables.errors] == ["s01"] and tables.noise_floor == 0.5
    rows = folder.read_tables("lc_samples").to_pylist()
    assert [(row["sample_id"], row["mode"], row["layer"]) for row in rows] == [
        (row.sample_id, mode, layer) for row in tables.used for mode in MODES for layer in range(LAYERS)
    ]
    # The fifth sample has no image, so it does not count for a visual mode.
    layers = layer_records(tables, num_layers=LAYERS, kl_direction=KlDirection.FULL_ABLATED, seed=0)
    assert {row.mode: row.n for row in layers} == {Mode.FREEZE_VISUAL: 3, Mode.FREEZE_TEXT: 4}


def test_a_lost_sample_is_never_silent(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    keep(folder, Unit(0, 0, 2))
    keep(folder, Unit(0, 2, LAYERS), lost="s03")
    with pytest.raises(ShortVError, match="'s03' was lost"):
        run(folder)
