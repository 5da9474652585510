"""Folders that are at odds with themselves are refused in one line; `test_damage` has the other kinds of damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reports.page import write_page
from reports.store import Folder
from shortv.errors import ShortVError
from tests.reports.runs import make_campaign, make_sweep

Damage = Callable[[Folder], None]


def truncated(name: str) -> Damage:
    return lambda folder: folder.write_bytes(name, folder.read_bytes(name)[:-9])


def without(name: str) -> Damage:
    return lambda folder: folder.delete(name)


def manifest(**changes: Any) -> Damage:
    return lambda folder: folder.write_json("manifest.json", {**folder.read_json("manifest.json"), **changes})


def first_row(table: str, **changes: Any) -> Damage:
    def damage(folder: Folder) -> None:
        rows = folder.read_table(table).to_pylist()
        folder.write_table(table, [{**rows[0], **changes}, *rows[1:]])

    return damage


def newer_table(folder: Folder) -> None:
    table = folder.read_table("errors").replace_schema_metadata({"schema_version": "7"})
    folder.write_parquet("errors", table)


@pytest.mark.parametrize(
    ("make", "damage", "message"),
    [
        (make_sweep, without("manifest.json"), "has no manifest.json; give an output folder"),
        (make_sweep, manifest(counts={"used": 4}), "counts 4 samples as used, samples.parquet has 3"),
        (make_sweep, manifest(num_layers=6), "each of 6 layers once"),
        (make_sweep, truncated("lc_samples/part-00001.parquet"), "part-00001.parquet is not a whole Parquet file"),
        (make_sweep, truncated("plans/two.json"), "plans/two.json: "),
        (make_sweep, newer_table, "schema version 7, expected 1"),
        (make_sweep, first_row("lc_layers", mean=float("nan")), "an LC that is not a number"),
        (make_sweep, without("samples.parquet"), "has no samples.parquet although its run has ended"),
        (make_sweep, without("lc_samples/part-00001.parquet"), "has 2 samples for freeze-text in layer 0"),
        (make_campaign, truncated("metrics.parquet"), "metrics.parquet is not a whole Parquet file"),
        (make_campaign, without("speed.parquet"), "has no speed.parquet"),
        (make_campaign, first_row("cells", cell="f" * 64), "other tables have 1 more"),
        (
            make_campaign,
            manifest(plans=[{"model": "org/m", "name": "p", "modes": ["full"]}]),
            "lists plans without kind or digest",
        ),
    ],
)
def test_a_damaged_folder_has_no_page(make: Any, damage: Damage, message: str, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, rows_per_part=24) if make is make_sweep else make_campaign(tmp_path)
    damage(folder)
    with pytest.raises(ShortVError) as caught:
        write_page(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not folder.exists("report.html")
