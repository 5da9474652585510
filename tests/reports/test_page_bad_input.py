"""Folders that are damaged, of another release or at odds with themselves are refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.page import write_page
from reports.schemas import table_of
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.plan import Mode
from tests.reports.runs import campaign_manifest, make_campaign, make_sweep, sweep_manifest

MODES = list(Mode)[1:3]


def truncate(name: str) -> Callable[[Folder], None]:
    return lambda folder: folder.write_bytes(name, folder.read_bytes(name)[:-9])


def newer_table(folder: Folder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table_of("errors", []).replace_schema_metadata({"schema_version": "7"}), sink)
    folder.write_bytes("errors.parquet", sink.getvalue().to_pybytes())


def newer_manifest(folder: Folder) -> None:
    folder.write_json("manifest.json", {**folder.read_json("manifest.json"), "schema_version": 2})


def deeper(folder: Folder) -> None:
    sweep_manifest(samples=3, layers=6, modes=MODES).save(folder)


def other_counts(folder: Folder) -> None:
    sweep_manifest(samples=4, layers=5, modes=MODES).save(folder)


def not_a_number(folder: Folder) -> None:
    rows = folder.read_table("lc_layers").to_pylist()
    folder.write_table("lc_layers", [{**rows[0], "mean": float("nan")}, *rows[1:]])


def strange_stability(folder: Folder) -> None:
    sweep_manifest(samples=3, layers=5, modes=MODES, stability={"freeze-visual": {"half": 0.5}}).save(folder)


def unnamed_plan(folder: Folder) -> None:
    plan = {"model": "org/m", "name": "p", "modes": ["full"]}
    campaign_manifest(state="partial", errors=2, plans=(plan,)).save(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.delete("manifest.json"), "has no manifest.json; give an output folder"),
        (lambda folder: folder.write_bytes("manifest.json", b"{"), "JSON"),
        (lambda folder: folder.write_json("manifest.json", {"kind": "other"}), "of kind 'other', not"),
        (newer_manifest, "schema version 2, this release reads 1"),
        (newer_table, "schema version 7, expected 1"),
        (truncate("lc_layers.parquet"), "lc_layers.parquet is not a whole Parquet file"),
        (truncate("lc_samples/part-00001.parquet"), "part-00001.parquet is not a whole Parquet file"),
        (truncate("plans/two.json"), "plans/two.json: "),
        (lambda folder: folder.delete("samples.parquet"), "has no samples.parquet although its run has ended"),
        (lambda folder: folder.delete("lc_samples/part-00001.parquet"), "has 2 samples for freeze-text in layer 0"),
        (not_a_number, "an LC that is not a number"),
        (strange_stability, "a stability that is not a share"),
        (deeper, "each of 6 layers once"),
        (other_counts, "counts 4 samples as used, samples.parquet has 3"),
    ],
)
def test_damaged_sweeps(damage: Callable[[Folder], None], message: str, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, rows_per_part=24)
    damage(folder)
    with pytest.raises(ShortVError) as caught:
        write_page(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not folder.exists("report.html")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unnamed_plan, "lists plans without kind or digest"),
        (truncate("metrics.parquet"), "metrics.parquet is not a whole Parquet file"),
        (lambda folder: folder.delete("speed.parquet"), "has no speed.parquet"),
        (lambda folder: folder.write_table("cells", folder.read_table("cells").slice(1)), "counts 4 cells"),
        (newer_manifest, "schema version 2, this release reads 1"),
    ],
)
def test_damaged_campaigns(damage: Callable[[Folder], None], message: str, tmp_path: Path) -> None:
    folder = make_campaign(tmp_path, failed=2)
    damage(folder)
    with pytest.raises(ShortVError) as caught:
        write_page(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
