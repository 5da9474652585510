"""Calibration files: what is read, and what is refused in one line."""

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.calibration import read_calibration
from reports.store import Folder
from shortv.errors import Refused
from shortv.sample import Sample


def columns(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sample_id": pa.array(["a", "b"]),
        "images": pa.array([[b"1", b"2"], []], pa.list_(pa.binary())),
        "prompt": pa.array(["Which?", "What?"]),
    }
    return {name: item for name, item in (values | changes).items() if item is not None}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "calibration.parquet"
    pq.write_table(pa.table(columns(**changes)), path)
    return path


def test_optional_columns_may_be_absent_and_others_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, split=pa.array([1, 2]), answer=pa.array(["yes", None]))
    assert read_calibration(path) == [
        Sample(sample_id="a", images=(b"1", b"2"), prompt="Which?", answer="yes"),
        Sample(sample_id="b", prompt="What?"),
    ]


@pytest.mark.parametrize(
    "images",
    [
        pa.array([[b"1", b"2"], None], pa.large_list(pa.large_binary())),
        pa.array(
            [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "b.png"}], None],
            pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        ),
    ],
    ids=["large", "hugging-face"],
)
def test_other_layouts_of_images_and_text(tmp_path: Path, images: pa.Array) -> None:
    text = {name: pa.array(columns()[name].to_pylist(), pa.large_string()) for name in ("sample_id", "prompt")}
    samples = read_calibration(written(tmp_path, images=images, dataset=pa.nulls(2), **text))
    assert [sample.images for sample in samples] == [(b"1", b"2"), ()]
    assert [sample.dataset for sample in samples] == [None, None]


def test_a_file_under_a_uri_keeps_damaged_images_for_their_error_rows(tmp_path: Path) -> None:
    path = written(tmp_path, images=pa.array([[None, b"not an image"], None], pa.list_(pa.binary())))
    name = uuid.uuid4().hex
    Folder(f"memory://{name}").write_bytes("c.parquet", path.read_bytes())
    assert [sample.images for sample in read_calibration(f"memory://{name}/c.parquet")] == [(b"", b"not an image"), ()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, r"lacks the column 'prompt', it has \['sample_id', 'images'\]"),
        ({"sample_id": pa.array([1, 2])}, "column sample_id of type int64; expected string"),
        ({"images": pa.array([b"1", b"2"])}, "column images of type binary; expected list<binary>"),
        ({"images": pa.array([["a.png"], []])}, "column images of type list.*string.*; expected list<binary>"),
        ({"answer": pa.array([1, 2])}, r"column answer of type int64; expected string\?"),
        ({"sample_id": pa.array(["a", "a"])}, "repeats 1 sample ids, 'a' first"),
        ({"sample_id": pa.array(["a", None])}, "1 rows without a sample_id"),
        ({"prompt": pa.array(["a", None])}, "1 rows without a prompt"),
        ({name: values[:0] for name, values in columns().items()}, "is empty"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        read_calibration(written(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for place, why in ((tmp_path / "none.parquet", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(Refused, match=why):
            read_calibration(place)
    path = written(tmp_path)
    whole = path.read_bytes()
    for data in (b"", b"sample_id,prompt\n", whole[:-20], whole[:4] + bytes(100) + whole[104:]):
        path.write_bytes(data)
        with pytest.raises(Refused, match="cannot be read as a Parquet file"):
            read_calibration(path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    prompt = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    images = pa.array([[]], pa.list_(pa.binary()))
    table = pa.Table.from_arrays([pa.array(["a"]), images, prompt], names=["sample_id", "images", "prompt"])
    pq.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(Refused, match="not UTF-8"):
        read_calibration(tmp_path / "latin.parquet")


def test_a_small_file_of_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 5000
    ids = pa.array([str(number) for number in range(rows)])
    columns = {"sample_id": ids, "images": [[bytes(1000)]] * rows, "prompt": ["?"] * rows}
    pq.write_table(pa.table(columns), tmp_path / "many.parquet")
    assert (tmp_path / "many.parquet").stat().st_size < 100_000
    monkeypatch.setattr("reports.calibration.MAX_BYTES", 1_000_000)
    with pytest.raises(Refused, match="smaller"):
        read_calibration(tmp_path / "many.parquet")
