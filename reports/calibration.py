"""Calibration samples read from a Parquet file."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs
from pyarrow import parquet as pq

from reports.locations import FILE_ERRORS, Location, locate, one_line
from shortv.errors import Refused
from shortv.sample import CALIBRATION_COLUMNS, Sample

MAX_SAMPLES = 100_000
"""Most samples of one calibration file. They are all in the driver's memory; training reads its data in batches."""
MAX_BYTES = 8 << 30
_BUFFER_BYTES = 2**20
_EXPECTED = ", ".join(f"{name}: {kind}" for name, kind in CALIBRATION_COLUMNS.items())


def read_calibration(uri: "str | os.PathLike[str]") -> list[Sample]:
    """Read the samples of a calibration file, local or under a URI, in file order.

    Raises:
        Refused: as `calibration_batches`, or a sample id is repeated, or the file exceeds a bound.
    """
    samples: list[Sample] = []
    size = 0
    # Few rows at a time: a small file can hold many copies of one large image.
    for batch in calibration_batches(uri, rows=4):
        samples += batch
        size += sum(len(image) for sample in batch for image in sample.images)
        if len(samples) > MAX_SAMPLES or size > MAX_BYTES:
            raise Refused(
                f"{locate(uri).shown} holds more than {MAX_SAMPLES} samples or {MAX_BYTES} bytes of images; "
                "give a smaller calibration file"
            )
    counts = Counter(sample.sample_id for sample in samples)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        shown = locate(uri).shown
        raise Refused(f"{shown} repeats {len(repeated)} sample ids, {repeated[0]!r} first; give each sample its own")
    return samples


def calibration_batches(uri: "str | os.PathLike[str]", *, rows: int = 64) -> Iterator[list[Sample]]:
    """Read a calibration file in batches of up to `rows` samples, in file order and in bounded memory.

    Columns are `CALIBRATION_COLUMNS`; others are ignored. Images are taken as they are: a null or damaged one
    becomes an empty or undecodable image, for which its sample alone gets an error row later.

    Raises:
        Refused: the file is missing, unreadable or empty, lacks a column or has one of a wrong type, or a sample has
            no id or no prompt.
    """
    location = locate(uri)
    shown, number = location.shown, 0
    try:
        _check_file(location)
        with location.filesystem.open_input_file(location.path) as source:
            # Pages are read one after another: a row group may be larger than memory.
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            names = file.schema_arrow.names
            _check_names(names, shown)
            columns = [name for name in CALIBRATION_COLUMNS if name in names]
            _check_types(file.schema_arrow, columns, shown)
            for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                number += batch.num_rows
                _check_values(batch, shown)
                yield [_sample(row) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:
        raise Refused(f"{shown} holds text that is not UTF-8: {one_line(error)}; write it again as UTF-8") from error
    except FILE_ERRORS as error:
        raise Refused(
            f"{shown} is not a readable Parquet file: {one_line(error)}; expected columns {_EXPECTED}"
        ) from error
    if not number:
        raise Refused(f"{shown} is empty; give a calibration file with at least one row")


def calibration_rows(uri: "str | os.PathLike[str]") -> int:
    """Number of samples that a calibration file says it holds. Raises Refused as `calibration_batches`."""
    location = locate(uri)
    _check_file(location)
    try:
        with location.filesystem.open_input_file(location.path) as source:
            return int(pq.read_metadata(source).num_rows)
    except FILE_ERRORS as error:
        raise Refused(f"{location.shown} is not a readable Parquet file: {one_line(error)}") from error


def _check_file(location: Location) -> None:
    shown = location.shown
    try:
        info = location.filesystem.get_file_info(location.path)
    except FILE_ERRORS as error:
        raise Refused(f"calibration file {shown} cannot be reached: {one_line(error)}") from error
    if info.type == pafs.FileType.NotFound:
        raise Refused(f"calibration file {shown} does not exist; check the path")
    if info.type == pafs.FileType.Directory:
        raise Refused(f"{shown} is a folder; give one Parquet file with the columns {_EXPECTED}")


def _check_names(names: Sequence[str], shown: str) -> None:
    required = [name for name, kind in CALIBRATION_COLUMNS.items() if not kind.endswith("?")]
    missing = [name for name in required if name not in names]
    if missing:
        raise Refused(f"{shown} lacks the columns {missing}, it has {list(names)}; expected {_EXPECTED}")
    repeated = [name for name in CALIBRATION_COLUMNS if names.count(name) > 1]
    if repeated:
        raise Refused(f"{shown} has more than one column named {repeated}; expected {_EXPECTED}")


def _check_types(schema: pa.Schema, columns: Sequence[str], shown: str) -> None:
    for field in map(schema.field, columns):
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


def _check_values(batch: pa.RecordBatch, shown: str) -> None:
    for name in ("sample_id", "prompt"):
        nulls = batch.column(name).null_count
        if nulls:
            raise Refused(f"{shown} has {nulls} rows without a {name}; give each row one")


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
