"""Tables of other releases: what an older one left out is null, what a newer one added is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.schemas import DOCUMENTATION, SCHEMAS, TABLES, documentation, table_of
from reports.store import Folder
from shortv.errors import ShortVError

CELL: dict[str, Any] = dict.fromkeys(SCHEMAS["cells"].names) | {
    **{name: name for name in ("cell", "model", "plan", "plan_digest", "task", "task_digest", "state")},
    **{"seed": 0, "n": 2, "errors": 0, "started": "s", "finished": "f", "wall_seconds": 1.0},
}
NEW = ("learned_parameters", "train_seconds")


def cells() -> pa.Table:
    return table_of("cells", [CELL | dict.fromkeys(NEW, 7)])


def read(tmp_path: Path, table: pa.Table, name: str = "cells") -> pa.Table:
    pq.write_table(table, tmp_path / f"{name}.parquet")
    return Folder(tmp_path).read_table(name)


def with_metadata(**changes: str) -> pa.Table:
    table = cells()
    return table.replace_schema_metadata(
        {**table.schema.metadata, **{name.encode(): value for name, value in changes.items()}}
    )


def test_every_column_is_documented_and_the_page_of_tables_is_up_to_date() -> None:
    assert DOCUMENTATION.read_text("utf-8") == documentation(), "run `make docs`"
    assert all(c.meaning.endswith(".") and "|" not in c.meaning for table in TABLES.values() for c in table.columns)
    assert SCHEMAS["samples"].field("answer").nullable and not SCHEMAS["samples"].field("prompt").nullable
    assert str(SCHEMAS["calibration"].field("images").type) == "list<item: binary>"


def test_what_an_older_release_did_not_write_is_null(tmp_path: Path) -> None:
    found = read(tmp_path, cells().drop_columns(list(NEW)))
    assert found.schema.equals(SCHEMAS["cells"], check_metadata=True)
    assert found.to_pylist() == [CELL]


def test_parts_of_two_releases_are_one_table(tmp_path: Path) -> None:
    row = dict.fromkeys(SCHEMAS["answers"].names, None) | {"scores": []}
    row |= {name: name for name in ("cell", "sample_id", "model", "plan", "task")}
    new = table_of("answers", [row | {"kind": "colour", "exit_layer": 3}])
    (tmp_path / "answers").mkdir()
    pq.write_table(new, tmp_path / "answers" / "b.parquet")
    pq.write_table(new.drop_columns(["kind", "exit_layer"]), tmp_path / "answers" / "a.parquet")
    found = Folder(tmp_path).read_tables("answers")
    assert found["kind"].to_pylist() == [None, "colour"] and found["exit_layer"].to_pylist() == [None, 3]


def _typed(name: str, kind: pa.DataType) -> pa.Table:
    table = cells()
    place = table.schema.get_field_index(name)
    return table.set_column(place, pa.field(name, kind, nullable=False), table[name].cast(kind))


REFUSED = {
    "newer": (
        cells().append_column("colour", pa.array(["red"])).append_column("size", pa.array([1])),
        r"was written by a newer release of this project \(columns colour, size\): update it",
    ),
    "newer-version": (with_metadata(schema_version="7"), "schema version 7, expected 1; read it with the release"),
    "older-version": (with_metadata(schema_version="0"), "schema version 0, expected 1; read it with the release"),
    "no-version": (cells().replace_schema_metadata(None), "schema version none, expected 1; read it with the release"),
    "other-table": (with_metadata(shortv_table="metrics"), "holds the table metrics; restore the file"),
    "needed": (cells().drop_columns(["n", "task"]), "lacks the columns task, n; restore the file"),
    "type": (_typed("n", pa.int64()), r"columns of another type or order \(n int64\)"),
    "nullable": (
        cells().cast(
            pa.schema(
                [*list(cells().schema)[:-1], pa.field("wall_seconds", pa.float64())], metadata=cells().schema.metadata
            )
        ),
        r"columns of another type or order \(wall_seconds double\)",
    ),
    "order": (cells().select([*SCHEMAS["cells"].names[1:], "cell"]), r"columns of another type or order \(model, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_differences_are_refused_with_one_line(tmp_path: Path, case: str) -> None:
    table, message = REFUSED[case]
    with pytest.raises(ShortVError, match=message) as caught:
        read(tmp_path, table)
    assert "\n" not in str(caught.value) and "sweep" not in str(caught.value)


def test_scores_come_back_from_a_part(tmp_path: Path) -> None:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["answers"].names)
    row |= {"cell": "k", "sample_id": "s", "model": "m", "plan": "full", "task": "t"}
    row["scores"] = [{"metric": "exact_match", "value": 1.0}, {"metric": "other", "value": None}]
    folder = Folder(tmp_path)
    folder.write_table("answers/k", [row, row | {"sample_id": "failed", "scores": [], "error": "truncated"}])
    assert folder.read_table("answers/k").to_pylist()[0] == row
    assert folder.read_tables("answers").num_rows == 2
    with pytest.raises(ValueError, match="'scores' of table 'answers/k' holds a null"):
        folder.write_table("answers/k", [row | {"scores": None}])
    with pytest.raises(pa.ArrowException):
        folder.write_table("answers/k", [row | {"latency_ms": "fast"}])
