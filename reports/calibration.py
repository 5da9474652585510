"""Calibration samples read from a Parquet file."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs
from pyarrow import parquet as pq

from reports.locations import Location, locate, one_line
from shortv.errors import Refused
from shortv.sample import CALIBRATION_COLUMNS, Sample

_EXPECTED = ", ".join(f"{name}: {kind}" for name, kind in CALIBRATION_COLUMNS.items())


def read_calibration(uri: "str | os.PathLike[str]") -> list[Sample]:
    """Read the samples of a calibration file, local or under a URI, in file order.

    Columns are `CALIBRATION_COLUMNS`; others are ignored. Images are taken as they are: a null or damaged one
    becomes an empty or undecodable image, for which its sample alone gets an error row later.

    Raises:
        Refused: the file is missing, unreadable or empty, lacks a column or has one of a wrong type, or holds null
            or repeated sample ids or null prompts.
    """
    location = locate(uri)
    table = _columns(location)
    _check_types(table.schema, location.shown)
    if table.num_rows == 0:
        raise Refused(f"{location.shown} holds no sample; give a calibration file with at least one row")
    _check_values(table, location.shown)
    return [_sample(row) for row in table.to_pylist()]


def _columns(location: Location) -> pa.Table:
    shown = location.shown
    try:
        info = location.filesystem.get_file_info(location.path)
    except OSError as error:
        raise Refused(f"calibration file {shown} cannot be reached: {one_line(error)}") from error
    if info.type == pafs.FileType.NotFound:
        raise Refused(f"calibration file {shown} does not exist; check the path")
    if info.type == pafs.FileType.Directory:
        raise Refused(f"{shown} is a folder; give one Parquet file with the columns {_EXPECTED}")
    try:
        with location.filesystem.open_input_file(location.path) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            _check_names(names, shown)
            return file.read(columns=[name for name in CALIBRATION_COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        raise Refused(
            f"{shown} is not a readable Parquet file: {one_line(error)}; expected columns {_EXPECTED}"
        ) from error


def _check_names(names: Sequence[str], shown: str) -> None:
    required = [name for name, kind in CALIBRATION_COLUMNS.items() if not kind.endswith("?")]
    missing = [name for name in required if name not in names]
    if missing:
        raise Refused(f"{shown} lacks the columns {missing}, it has {list(names)}; expected {_EXPECTED}")
    repeated = [name for name in CALIBRATION_COLUMNS if names.count(name) > 1]
    if repeated:
        raise Refused(f"{shown} has more than one column named {repeated}; expected {_EXPECTED}")


def _check_types(schema: pa.Schema, shown: str) -> None:
    for field in schema:
        kind = CALIBRATION_COLUMNS[field.name]
        optional = kind.endswith("?") and pa.types.is_null(field.type)
        if not (_is_images(field.type) if field.name == "images" else _is_text(field.type) or optional):
            raise Refused(f"{shown} has column {field.name} of type {field.type}; expected {kind}")


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_images(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    # Hugging Face datasets write an image as a struct of its bytes and the path it once had.
    wrapped = pa.types.is_struct(item) and item.get_field_index("bytes") >= 0
    return _is_binary(item.field("bytes").type if wrapped else item)


def _check_values(table: pa.Table, shown: str) -> None:
    for name in ("sample_id", "prompt"):
        nulls = table.column(name).null_count
        if nulls:
            raise Refused(f"{shown} has {nulls} rows without a {name}; give each row one")
    counts = Counter(table.column("sample_id").to_pylist())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise Refused(f"{shown} repeats {len(repeated)} sample ids, {repeated[0]!r} first; give each sample its own")


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        sample_id=row["sample_id"],
        images=tuple(_image_bytes(item) for item in row["images"] or ()),
        prompt=row["prompt"],
        answer=row.get("answer"),
        dataset=row.get("dataset"),
    )


def _image_bytes(item: Any) -> bytes:
    data = item.get("bytes") if isinstance(item, dict) else item
    return data or b""
