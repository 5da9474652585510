"""Arrow schemas of every result table, written explicitly and never inferred."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1


def _schema(table: str, fields: list[tuple[str, pa.DataType, bool]]) -> pa.Schema:
    metadata = {"shortv_table": table, "schema_version": str(SCHEMA_VERSION)}
    return pa.schema([pa.field(name, kind, nullable) for name, kind, nullable in fields], metadata=metadata)


SCHEMAS: dict[str, pa.Schema] = {
    "samples": _schema(
        "samples",
        [
            ("sample_id", pa.string(), False),
            ("dataset", pa.string(), True),
            ("prompt", pa.string(), False),
            ("answer", pa.string(), True),
            ("n_text", pa.int32(), False),
            ("n_visual", pa.int32(), False),
        ],
    ),
    "lc_samples": _schema(
        "lc_samples",
        [
            ("sample_id", pa.string(), False),
            ("mode", pa.string(), False),
            ("layer", pa.int32(), False),
            ("kl_full_ablated", pa.float64(), False),
            ("kl_ablated_full", pa.float64(), False),
            ("top1_changed", pa.bool_(), False),
        ],
    ),
    "lc_layers": _schema(
        "lc_layers",
        [
            ("mode", pa.string(), False),
            ("layer", pa.int32(), False),
            ("n", pa.int32(), False),
            ("kl_direction", pa.string(), False),
            ("mean", pa.float64(), False),
            ("ci_low", pa.float64(), False),
            ("ci_high", pa.float64(), False),
            ("rank", pa.int32(), False),
            ("rank_low", pa.int32(), False),
            ("rank_high", pa.int32(), False),
        ],
    ),
    "errors": _schema(
        "errors",
        [
            ("sample_id", pa.string(), False),
            ("stage", pa.string(), False),
            ("error", pa.string(), False),
            ("message", pa.string(), False),
        ],
    ),
    "calibration": _schema(
        "calibration",
        [
            ("sample_id", pa.string(), False),
            ("images", pa.list_(pa.binary()), True),
            ("prompt", pa.string(), False),
            ("answer", pa.string(), True),
            ("dataset", pa.string(), True),
        ],
    ),
}


def schema_of(name: str) -> pa.Schema:
    """Return the schema of a table or of one of its parts (`lc_samples/part-00000`).

    Raises:
        KeyError: no table of that name exists; a mistake of the caller, not of the user.
    """
    return SCHEMAS[name.split("/")[0].removesuffix(".parquet")]


def table_of(name: str, rows: Iterable[Any]) -> pa.Table:
    """Build the Arrow table of records (dataclasses, named tuples or mappings) under its fixed schema.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: a value does not fit its column.
        ValueError: a null stands in a column that allows none.
    """
    schema = schema_of(name)
    cells = [[_cell(row, field.name) for field in schema] for row in rows]
    columns = [pa.array([row[index] for row in cells], type=field.type) for index, field in enumerate(schema)]
    for field, column in zip(schema, columns, strict=True):
        if column.null_count and not field.nullable:
            raise ValueError(f"column {field.name!r} of table {name!r} holds a null")
    return pa.Table.from_arrays(columns, schema=schema)


def _cell(row: Any, name: str) -> Any:
    value = row[name] if isinstance(row, Mapping) else getattr(row, name)
    # Arrow takes exact strings only in some builds: an enumeration member becomes its value.
    return str(value) if isinstance(value, str) else value
