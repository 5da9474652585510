"""Tables: documented in one place; what an older release left out is null, what a newer one added is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.schemas import DOCUMENTATION, SCHEMAS, TABLES, documentation, table_of
from reports.store import Folder
from shortv.errors import ShortVError

NAMES = ("cell", "sample_id", "model", "plan", "task")
ANSWER: dict[str, Any] = (
    dict.fromkeys(SCHEMAS["answers"].names) | {name: name for name in NAMES} | {"doc": 7, "scores": []}
)
NEW = {"kind": "colour", "exit_layer": 3}


def test_every_column_is_documented_and_the_page_of_tables_is_up_to_date() -> None:
    assert DOCUMENTATION.read_text("utf-8") == documentation(), "run `make docs`"
    assert all(c.meaning.endswith(".") and "|" not in c.meaning for table in TABLES.values() for c in table.columns)
    assert SCHEMAS["samples"].field("answer").nullable and not SCHEMAS["samples"].field("prompt").nullable
    assert str(SCHEMAS["calibration"].field("images").type) == "list<item: binary>"


def test_parts_of_two_releases_are_one_table(tmp_path: Path) -> None:
    scores = [{"metric": "exact_match", "value": 1.0}, {"metric": "other", "value": None}]
    new = table_of("answers", [ANSWER | NEW | {"scores": scores}])
    (tmp_path / "answers").mkdir()
    pq.write_table(new, tmp_path / "answers" / "b.parquet")
    pq.write_table(new.drop_columns(list(NEW)), tmp_path / "answers" / "a.parquet")
    found = Folder(tmp_path).read_tables("answers")
    assert found.schema.equals(SCHEMAS["answers"], check_metadata=True)
    assert found.to_pylist() == [ANSWER | {"scores": scores}, ANSWER | NEW | {"scores": scores}]


def _with_metadata(metadata: dict[str, str] | None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(metadata)


def _with_field(field: pa.Field) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(field.name), field, pa.nulls(1, field.type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.append_column("size", pa.array([1])), r"newer release .*\(columns size\): update it"),
        (_with_metadata({"schema_version": "7"}), "schema version 7, expected 1; read it with the release"),
        (_with_metadata(None), "schema version none, expected 1; read it with the release"),
        (
            _with_metadata({"schema_version": "1", "shortv_table": "metrics"}),
            "holds the table metrics; restore the file",
        ),
        (lambda table: table.drop_columns(["cell", "task"]), "lacks the columns cell, task; restore the file"),
        (_with_field(pa.field("exit_layer", pa.int64())), r"columns of another type or order \(exit_layer int64\)"),
        (_with_field(pa.field("task", pa.string())), r"columns of another type or order \(task string\)"),
        (lambda table: table.select([*table.column_names[1:], "cell"]), r"another type or order \(model, "),
    ],
)
def test_other_differences_are_refused_with_one_line(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(change(table_of("answers", [ANSWER])), tmp_path / "answers.parquet")
    with pytest.raises(ShortVError, match=message) as caught:
        Folder(tmp_path).read_table("answers")
    assert "\n" not in str(caught.value)
