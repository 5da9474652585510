"""Arrow schemas of every result table, written explicitly and never inferred."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
_SCORES = pa.list_(pa.struct([pa.field("metric", pa.string(), False), pa.field("value", pa.float64(), True)]))


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
    "cells": _schema(
        "cells",
        [
            ("cell", pa.string(), False),
            ("model", pa.string(), False),
            ("revision", pa.string(), True),
            ("plan", pa.string(), False),
            ("plan_digest", pa.string(), False),
            # The plan with the same modes that ran, where this one is but another name for it.
            ("same_as", pa.string(), True),
            ("task", pa.string(), False),
            ("task_digest", pa.string(), False),
            ("limit", pa.float64(), True),
            ("seed", pa.int64(), False),
            ("state", pa.string(), False),
            ("n", pa.int32(), False),
            ("errors", pa.int32(), False),
            ("message", pa.string(), True),
            ("flops_ratio", pa.float64(), True),
            ("started", pa.string(), False),
            ("finished", pa.string(), False),
            ("wall_seconds", pa.float64(), False),
        ],
    ),
    "answers": _schema(
        "answers",
        [
            ("cell", pa.string(), False),
            ("sample_id", pa.string(), False),
            ("model", pa.string(), False),
            # The name under which the cell ran; another plan of the same modes finds its answers by the cell.
            ("plan", pa.string(), False),
            ("task", pa.string(), False),
            ("prediction", pa.string(), True),
            ("target", pa.string(), True),
            ("scores", _SCORES, False),
            ("error", pa.string(), True),
            ("latency_ms", pa.float64(), True),
            ("queue_ms", pa.float64(), True),
            ("prefill_ms", pa.float64(), True),
            ("decode_ms", pa.float64(), True),
            ("prompt_tokens", pa.int32(), True),
            ("visual_tokens", pa.int32(), True),
            ("completion_tokens", pa.int32(), True),
        ],
    ),
    "metrics": _schema(
        "metrics",
        [
            ("cell", pa.string(), False),
            ("model", pa.string(), False),
            ("plan", pa.string(), False),
            ("plan_digest", pa.string(), False),
            ("task", pa.string(), False),
            ("metric", pa.string(), False),
            ("filter", pa.string(), False),
            ("value", pa.float64(), True),
            ("stderr", pa.float64(), True),
            ("stderr_clt", pa.float64(), True),
            ("stderr_clustered", pa.float64(), True),
            ("n", pa.int32(), False),
        ],
    ),
    "comparisons": _schema(
        "comparisons",
        [
            ("model", pa.string(), False),
            ("task", pa.string(), False),
            ("metric", pa.string(), False),
            ("plan", pa.string(), False),
            ("against", pa.string(), False),
            ("n", pa.int32(), False),
            ("value", pa.float64(), False),
            ("against_value", pa.float64(), False),
            ("difference", pa.float64(), False),
            ("ci_low", pa.float64(), False),
            ("ci_high", pa.float64(), False),
            ("share_changed", pa.float64(), False),
        ],
    ),
    "speed": _schema(
        "speed",
        [
            ("cell", pa.string(), False),
            ("model", pa.string(), False),
            ("plan", pa.string(), False),
            ("task", pa.string(), False),
            ("n", pa.int32(), False),
            ("prefill_ms_median", pa.float64(), True),
            ("decode_ms_per_token_median", pa.float64(), True),
            ("latency_ms_median", pa.float64(), True),
            ("samples_per_second", pa.float64(), True),
            # Means over the samples that were answered: text tokens and visual tokens of a prompt.
            ("t", pa.float64(), True),
            ("v", pa.float64(), True),
            ("flops_ratio", pa.float64(), True),
            ("replicas", pa.int32(), True),
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
