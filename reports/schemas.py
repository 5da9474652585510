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


def difference(found: pa.Schema, name: str) -> str | None:
    """Return what keeps a file of this schema from being read as a table, None where nothing does.

    An older release may have written fewer nullable columns.
    """
    wanted, metadata = schema_of(name), found.metadata or {}
    table = metadata.get(b"shortv_table", wanted.metadata[b"shortv_table"]).decode(errors="replace")
    version = metadata.get(b"schema_version", b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        return f"has schema version {version}, expected {SCHEMA_VERSION}; {_advice(version)}"
    if table != wanted.metadata[b"shortv_table"].decode():
        return f"holds the table {table}; restore the file, or make it again"
    unknown = [column for column in found.names if column not in wanted.names]
    missing = [field.name for field in wanted if field.name not in found.names and not field.nullable]
    if missing:
        return f"lacks the columns {', '.join(missing)}; restore the file, or make it again"
    if unknown:
        return f"was written by a newer release of this project (columns {', '.join(unknown)}): update it"
    other = [f"{field.name} {field.type}" for field in found if field != wanted.field(field.name)]
    if other or found.names != [column for column in wanted.names if column in found.names]:
        return f"has columns of another type or order ({', '.join(other or found.names)}); make it again"
    return None


def _advice(version: str) -> str:
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        return "it was written by a newer release of this project: update it"
    return "read it with the release that wrote it, or make it again"


def fitted(table: pa.Table, name: str) -> pa.Table:
    """Return a table that `difference` lets pass as this release has it: columns that it lacks hold nulls."""
    schema = schema_of(name)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


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
