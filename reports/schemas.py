"""Arrow schemas of every result table, made from their documentation and never inferred from data."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from reports.fields import TABLES, Field

SCHEMA_VERSION = 1
_SCORES = pa.list_(pa.struct([pa.field("metric", pa.string(), False), pa.field("value", pa.float64(), True)]))
_NESTED = {"scores": _SCORES, "images": pa.list_(pa.binary())}


def _schema(table: str, fields: Iterable[Field]) -> pa.Schema:
    metadata = {"shortv_table": table, "schema_version": str(SCHEMA_VERSION)}
    return pa.schema([_arrow_field(field) for field in fields], metadata=metadata)


def _arrow_field(field: Field) -> pa.Field:
    name = field.kind.removesuffix("?")
    kind = _NESTED[name] if name in _NESTED else pa.type_for_alias(name)
    return pa.field(field.name, kind, nullable=field.kind.endswith("?"))


SCHEMAS: dict[str, pa.Schema] = {name: _schema(name, table.fields) for name, table in TABLES.items()}


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
