"""Each step's samples depend on the seed alone, and a data set of any size passes through bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.calibration import read_calibration
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.workers.samples import calibration_digest
from shortv.workers.training import data
from shortv.workers.training.data import DataSet, Order, Shards, batches_of_worker, sources_of
from tests.tiny_model import TINY

ROOT = Path(__file__).resolve().parents[3]
CALIBRATION = str(TINY / "calibration.parquet")


def file_of(path: Path, names: list[str], images: list[list[bytes]] | None = None) -> str:
    table = {
        "sample_id": names,
        "images": pa.array(images or [[b"image"]] * len(names), pa.list_(pa.binary())),
        "prompt": ["a prompt"] * len(names),
    }
    pq.write_table(pa.table(table), path)
    return str(path)


def data_set(*files: str, limit: float | None = None, needs_images: bool = False) -> DataSet:
    return DataSet(sources=sources_of(files, limit=limit, seed=0, include_path=None), needs_images=needs_images)


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(samples=10, batch_size=4, seed=1)
    stream = [row for step in range(10) for row in order.rows(step)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order.rows(7) == tuple(stream[28:32])
    assert replace(order, seed=2).rows(0) != order.rows(0)
    assert order.rows(0) == (8, 5, 9, 6), "the order of a seed is a promise to runs that continue"
    for workers in (2, 4):
        assert order.rows(5) == tuple(row for worker in range(workers) for row in order.rows(5, worker, workers))


def test_a_scan_gives_the_digest_of_all_samples_and_names_what_cannot_be_used(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.parquet", ["a", "b", "c"], [[b"1"], [], [b"2", b"3"]])
    found = data_set(path, CALIBRATION, limit=2, needs_images=True).scan()
    samples = [*read_calibration(path)[:2], *read_calibration(CALIBRATION)[:2]]
    assert (found.samples, found.digest) == (4, calibration_digest(samples))
    assert [(error.sample_id, error.error) for error in found.unusable] == [("b", "no-image")]
    assert found.unanswered == ["a", "b"]
    assert data_set(CALIBRATION, limit=0.26).scan().samples == -(-26 * len(read_calibration(CALIBRATION)) // 100)


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    first, second = file_of(tmp_path / "a.parquet", ["a", "b"]), file_of(tmp_path / "b.parquet", ["c", "b"])
    with pytest.raises(Refused, match=r"'b' occurs twice in .*a.parquet and .*b.parquet"):
        data_set(first, second).scan()
    with pytest.raises(Refused, match="'a' occurs twice"):
        data_set(file_of(tmp_path / "c.parquet", ["a", "a"])).scan()


def test_shards_give_each_usable_sample_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_SHARD_BYTES", 4096)  # some samples in each
    samples, folder = read_calibration(CALIBRATION), Folder(tmp_path / "out")
    whole = data_set(file_of(tmp_path / "a.parquet", ["text"], [[]]), CALIBRATION, needs_images=True)
    contents = whole.scan()
    whole.write_shards(folder, contents)
    assert len(folder.list(data.SHARDS)) > 3
    rows = [5, 0, len(samples) - 1, 5]
    assert Shards(str(tmp_path / "out")).read(rows) == [samples[row] for row in rows]
    order = Order(samples=len(samples), batch_size=4, seed=0)
    batches = batches_of_worker(str(tmp_path / "out"), order, start=2, steps=7, worker=1, workers=2)
    expected = [[samples[row] for row in order.rows(step, 1, 2)] for step in range(2, 7)]
    assert list(batches) == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    whole.write_shards(folder, contents)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_samples_that_change_between_the_passes_end_the_run(tmp_path: Path) -> None:
    whole = data_set(file_of(tmp_path / "a.parquet", ["a", "b"]))
    contents = whole.scan()
    file_of(tmp_path / "a.parquet", ["a", "c"])
    with pytest.raises(ShortVError, match="changed"):
        whole.write_shards(Folder(tmp_path / "out"), contents)
    with pytest.raises(ShortVError, match="shares"):
        Shards(str(tmp_path / "out"))


_MEASURED = """
import re, sys
from pathlib import Path
from reports.store import Folder
from shortv.workers.training.data import DataSet, Shards, sources_of
# Not ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, sources = peak(), sources_of([sys.argv[1]], limit=None, seed=0, include_path=None)
data = DataSet(sources=sources, needs_images=True)
contents = data.scan()
data.write_shards(Folder(sys.argv[2]), contents)
shards = Shards(sys.argv[2])
assert sum(len(shards.read([row])[0].images[0]) for row in range(0, contents.samples, 16)) > 0
print(contents.samples, peak() - before)
"""


@pytest.mark.slow
def test_a_data_set_larger_than_memory_passes_through_the_driver(tmp_path: Path) -> None:
    """3,200 images of 250 kB are 800 MB; the driver may grow by 400 MB, and grows as much for any number of them."""
    schema = pa.schema([("sample_id", pa.string()), ("images", pa.list_(pa.binary())), ("prompt", pa.string())])
    image, path, total = os.urandom(250_000), tmp_path / "large.parquet", 0
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, 3200, 100):
            images = [[f"{first + row}".encode() + image] for row in range(100)]
            total += sum(len(each) for row in images for each in row)
            rows = {"sample_id": [f"s{first + row}" for row in range(100)], "images": images, "prompt": ["?"] * 100}
            writer.write_table(pa.table(rows, schema=schema))
    command = [sys.executable, "-c", _MEASURED, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    samples, growth = map(int, done.stdout.split())
    assert samples == 3200 and growth < 400e6 <= total / 2, f"{growth / 1e6:.0f} MB"
