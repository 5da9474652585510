"""Calibration samples read from a Parquet file."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
from pyarrow import fs as pafs
from pyarrow import parquet as pq
from pyarrow import types as patypes

from reports.locations import FILE_ERRORS, locate, one_line
from shortv.errors import Refused
from shortv.sample import CALIBRATION_COLUMNS, Sample

MAX_SAMPLES: Final = 100_000
"""Most samples of one calibration file. They are all in the driver's memory; training reads its data in batches."""
MAX_BYTES: Final = 8 << 30
_EXPECTED: Final = ", ".join(f"{name}: {kind}" for name, kind in CALIBRATION_COLUMNS.items())


def read_calibration(uri: "str | os.PathLike[str]") -> list[Sample]:
    """Read the samples of a calibration file, local or under a URI, in file order.

    Raises:
        Refused: as `calibration_batches`, or a sample id is repeated, or the file exceeds a bound.
    """
    samples: list[Sample] = []
    size, shown = 0, locate(uri).shown
    # Few rows at a time: a small file can hold many copies of one large image.
    for batch in calibration_batches(uri, rows=4):
        samples += batch
        size += sum(len(image) for sample in batch for image in sample.images)
        if len(samples) > MAX_SAMPLES or size > MAX_BYTES:
            problem = f"{shown} holds more than {MAX_SAMPLES} samples or {MAX_BYTES} bytes of images"
            raise Refused(f"{problem}; give a smaller calibration file")
    repeated = [name for name, count in Counter(sample.sample_id for sample in samples).items() if count > 1]
    if repeated:
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
    shown, number = locate(uri).shown, 0
    with _opened(uri) as file:
        _check_columns(file.schema_arrow, shown)
        columns = [name for name in CALIBRATION_COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
            number += batch.num_rows
            for name in ("sample_id", "prompt"):
                if nulls := batch.column(name).null_count:
                    raise Refused(f"{shown} has {nulls} rows without a {name}; give each row one")
            yield [_sample(row) for row in batch.to_pylist()]
    if not number:
        raise Refused(f"{shown} is empty; give a calibration file with at least one row")


def calibration_rows(uri: "str | os.PathLike[str]") -> int:
    """Number of samples that a calibration file says it holds. Raises Refused as `calibration_batches`."""
    with _opened(uri) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _opened(uri: "str | os.PathLike[str]") -> Iterator[pq.ParquetFile]:
    filesystem, path, _, shown = locate(uri)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise Refused(f"calibration file {shown} does not exist; check the path")
        if kind == pafs.FileType.Directory:
            raise Refused(f"{shown} is a folder; give one Parquet file with the columns {_EXPECTED}")
        with filesystem.open_input_file(path) as source:
            # Pages are read one after another: a row group may be larger than memory.
            yield pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20)
    except UnicodeDecodeError as error:
        raise Refused(f"{shown} holds text that is not UTF-8: {one_line(error)}; write it again as UTF-8") from error
    except FILE_ERRORS as error:
        problem = f"{shown} cannot be read as a Parquet file: {one_line(error)}"
        raise Refused(f"{problem}; expected columns {_EXPECTED}") from error


def _check_columns(schema: pa.Schema, shown: str) -> None:
    """Raise Refused unless each column is there once, required ones at least, and of its type."""
    for name, kind in CALIBRATION_COLUMNS.items():
        optional = kind.endswith("?")
        if name not in schema.names:
            if optional:
                continue
            raise Refused(f"{shown} lacks the column {name!r}, it has {schema.names}; expected {_EXPECTED}")
        if schema.names.count(name) > 1:
            raise Refused(f"{shown} has more than one column named {name!r}; expected {_EXPECTED}")
        found = schema.field(name).type
        fits = _is_images(found) if name == "images" else _is(found, "string", *["null"] * optional)
        if not fits:
            raise Refused(f"{shown} has column {name} of type {found}; expected {kind}")


def _is(found: pa.DataType, *kinds: str) -> bool:
    """Tell whether a type is one of these, whatever the width of its offsets."""
    name = str(found).removeprefix("large_").removesuffix("_view")
    return name in kinds


def _is_images(found: pa.DataType) -> bool:
    if not (patypes.is_list(found) or patypes.is_large_list(found)):
        return False
    item = found.value_type
    # Hugging Face datasets write an image as a struct of its bytes and the path it once had.
    if patypes.is_struct(item) and item.get_field_index("bytes") >= 0:
        item = item.field("bytes").type
    return _is(item, "binary")


def _sample(row: dict[str, Any]) -> Sample:
    images = [item.get("bytes") if isinstance(item, dict) else item for item in row["images"] or ()]
    return Sample(
        sample_id=row["sample_id"],
        images=tuple(image or b"" for image in images),
        prompt=row["prompt"],
        answer=row.get("answer"),
        dataset=row.get("dataset"),
    )
