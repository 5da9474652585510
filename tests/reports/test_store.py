"""Result folders: the same behaviour locally and remotely, and nothing visible before it is whole."""

import errno
import os
import resource
import signal
import subprocess
import sys
import uuid
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFile

from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.atomic import remove_leftovers, replace_file
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode
from shortv.records import LcRecord


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    uri = f"memory://{uuid.uuid4().hex}/runs/one" if request.param == "memory" else str(tmp_path / "runs/one")
    made = Folder(uri)
    made.check_writable()
    return made


def lc_row(layer: int) -> LcRecord:
    kl = {"kl_full_ablated": 0.5, "kl_ablated_full": 0.25, "top1_changed": layer % 2 == 0}
    return LcRecord(sample_id=f"s{layer}", mode=Mode.FREEZE_VISUAL, layer=layer, **kl)


def test_tables_and_files_come_back_as_written(folder: Folder) -> None:
    for part in (10, 2):
        folder.write_table(f"lc_samples/part-{part:05d}", [lc_row(part)])
    folder.write_table("errors", [])
    folder.write_json("manifest.json", {"b": [1, None], "a": "ü"})
    assert folder.read_tables("lc_samples").to_pylist() == [asdict(lc_row(layer)) for layer in (2, 10)]
    assert folder.read_table("errors").schema.equals(SCHEMAS["errors"], check_metadata=True)
    assert folder.read_tables("lc_layers").num_rows == 0
    assert folder.read_json("manifest.json") == {"b": [1, None], "a": "ü"}
    parts = ["lc_samples/part-00002.parquet", "lc_samples/part-00010.parquet"]
    assert folder.list() == ["errors.parquet", *parts, "manifest.json"]
    assert folder.exists("lc_samples") and folder.exists("errors.parquet") and not folder.exists("errors")
    folder.delete("lc_samples")
    folder.delete("never-there")
    folder.write_bytes("plans/a.json", b"a long first version")
    folder.write_bytes("plans/a.json", b"second")
    assert folder.read_bytes("plans/a.json") == b"second"
    assert folder.list() == ["errors.parquet", "manifest.json", "plans/a.json"]


def test_a_table_keeps_its_columns_order_and_types(folder: Folder) -> None:
    row = {"sample_id": "s", "stage": "load", "error": "E", "message": "m"}
    folder.write_table("errors", pa.Table.from_pylist([{"extra": 1, **dict(reversed(row.items()))}]))
    assert folder.read_table("errors").to_pylist() == [row]
    with pytest.raises(ValueError, match="'message' of table 'errors' holds a null"):
        folder.write_table("errors", [row | {"message": None}])
    with pytest.raises(pa.ArrowException):
        folder.write_table("errors", [row | {"message": 1}])


@pytest.mark.parametrize("name", ["../outside.json", "/etc/outside", "a/../../b"])
def test_names_stay_inside(folder: Folder, name: str) -> None:
    with pytest.raises(ValueError, match="not a name inside"):
        folder.write_bytes(name, b"x")


def test_damaged_and_missing_files_are_named(folder: Folder) -> None:
    folder.write_table("lc_samples/part-00000", [lc_row(1)])
    whole = folder.read_bytes("lc_samples/part-00000.parquet")
    folder.write_bytes("lc_samples/part-00000.parquet", whole[:-9])
    with pytest.raises(ShortVError, match=r"part-00000.parquet is not a whole Parquet file"):
        folder.read_tables("lc_samples")
    with pytest.raises(ShortVError, match=r"samples.parquet could not be read"):
        folder.read_table("samples")
    with pytest.raises(ShortVError, match=r"part-00000.parquet is longer than 10 bytes"):
        folder.read_bytes("lc_samples/part-00000.parquet", limit_bytes=10)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_bytes("samples.parquet", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ShortVError, match=r"samples.parquet could not be written: .*File too large") as caught:
            folder.write_bytes("samples.parquet", [bytes(2**19)] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.parquet"}
    assert folder.read_bytes("samples.parquet") == b"old"


def test_a_failed_remote_write_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(f"memory://{uuid.uuid4().hex}")

    def broken(self: MemoryFile, data: bytes) -> int:
        raise OSError(errno.EPIPE, "connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "write", broken)
        with pytest.raises(ShortVError, match="connection lost"):
            folder.write_bytes("a.json", b"data")
    assert folder.list() == []


def test_leftovers_of_killed_writers_are_ignored_and_cleared(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from shortv.atomic import replace_file\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_file(pathlib.Path(sys.argv[1], 'lc_samples/part-00000.parquet'), b'half')"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 1 and not left[0].name.endswith(".parquet")
    folder = Folder(tmp_path)
    assert folder.list() == [] and folder.read_tables("lc_samples").num_rows == 0
    folder.check_writable()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_living_writer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: removed.extend(remove_leftovers(tmp_path)))
    replace_file(tmp_path / "a.json", b"whole")
    assert removed == [] and (tmp_path / "a.json").read_bytes() == b"whole"


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refused, match="is a file; give a folder"):
        Folder(tmp_path / "file").check_writable()
    with pytest.raises(Refused, match="cannot be written to"):
        Folder(tmp_path / "file/below").check_writable()
    with pytest.raises(Refused, match="cannot be written to /proc/shortv"):
        Folder("/proc/shortv").check_writable()


@pytest.mark.parametrize(
    "place",
    [
        "",
        "a\0b",
        "runs/\ud800",
        "~nobody-of-this-name/x",
        "abfs://container@account/x",
        "nosuch://user:hidden@host/x?secret_key=hidden",
        "s3://ID:hid/hidden@bucket/x",
    ],
)
def test_places_that_cannot_be_are_one_line_without_secrets(place: str) -> None:
    with pytest.raises(ShortVError) as caught:
        Folder(place).list()
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and "hid" not in str(caught.value)


def test_file_uris_are_local_and_others_are_shown_without_passwords(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/with%20space")
    folder.check_writable()
    folder.write_bytes("a", b"1")
    assert folder.local_path == tmp_path / "with space" and (tmp_path / "with space/a").exists()
    assert Folder("s3://access:hidden@bucket/x?region=eu-west-1").shown == "s3://***@bucket/x?region=eu-west-1"
