"""Answers are read part by part: the latest row of each document, of the cells asked for; damage is named."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.answers import Answers
from reports.schemas import SCHEMAS, table_of
from reports.store import Folder
from tests.reports.runs import cut

NAMES = {"model": "org/m", "task": "shapes", "scores": []}


def row(cell: str, doc: int, prediction: str | None, **others: Any) -> dict[str, Any]:
    """Return a row of the table of answers."""
    own = {"cell": cell, "plan": cell, "doc": doc, "sample_id": f"s{doc}", "prediction": prediction}
    return dict.fromkeys(SCHEMAS["answers"].names) | NAMES | own | others


def write(folder: Folder, number: int, rows: Iterable[dict[str, Any]]) -> None:
    """Write a part."""
    folder.write_table(f"answers/part-{number:06d}", rows)


def found(answers: Answers, **options: Any) -> list[tuple[Any, ...]]:
    """Return what a scan yields, row by row."""
    columns = ["prediction", "cell", "doc"]
    tables = list(answers.scan(columns, **options))
    assert all(table.column_names == columns and len(table) for table in tables)
    return [tuple(one.values()) for table in tables for one in table.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two cells in three parts; documents 0 and 2 of cell a were answered again."""
    folder = Folder(tmp_path)
    write(folder, 0, [row("a", doc, None) for doc in (2, 0, 1)] + [row("b", 0, "b0")])
    write(folder, 1, [row("a", 0, "first"), row("a", 0, "a0")])
    write(folder, 2, [])
    write(folder, 3, [row("a", 2, "a2"), row("b", 9, "b9")])
    return folder


def test_a_later_row_replaces_an_earlier_one_of_the_same_cell_and_document(folder: Folder) -> None:
    answers = Answers(folder)
    assert found(answers) == [(None, "a", 1), ("b0", "b", 0), ("a0", "a", 0), ("a2", "a", 2), ("b9", "b", 9)]
    assert found(answers, cells={"b", "x"}) == [("b0", "b", 0), ("b9", "b", 9)]
    assert {cell: answers.docs(cell).tolist() for cell in (*answers.cells, "x")} == {
        "a": [0, 1, 2],
        "b": [0, 9],
        "x": [],
    }
    write(folder, 4, [row("a", 1, "a1")])
    answers.update()
    assert found(answers, cells=["a"]) == [("a0", "a", 0), ("a2", "a", 2), ("a1", "a", 1)]
    assert found(Answers(folder)) == found(answers) and not answers.damaged


def test_a_part_is_read_only_where_it_has_wanted_cells(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, read = Answers(folder), []
    plain = Folder.read_table
    monkeypatch.setattr(
        Folder, "read_table", lambda self, name, columns: read.append(name) or plain(self, name, columns)
    )
    assert len(found(answers, cells={"b"})) == 2
    assert read == ["answers/part-000000.parquet", "answers/part-000003.parquet"]


def test_damaged_parts_are_named_and_what_they_held_is_missing(folder: Folder, tmp_path: Path) -> None:
    parts = tmp_path / "answers"
    cut(parts / "part-000003.parquet")
    write(folder, 4, [row("a", -1, None)])
    pq.write_table(table_of("answers", []).drop_columns(["doc"]), parts / "part-000005.parquet")
    # Text that is not Unicode, in a column that only a scan reads.
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    whole = table_of("answers", [row("b", 1, "")])
    pq.write_table(whole.set_column(whole.column_names.index("prediction"), "prediction", text), parts / "x.parquet")
    answers = Answers(folder)
    lines = {name.removeprefix("answers/"): line for name, line in answers.damaged.items()}
    assert "not a whole Parquet file" in lines["part-000003.parquet"]
    assert "the document -1" in lines["part-000004.parquet"]
    assert "lacks the columns doc" in lines["part-000005.parquet"]
    assert len(lines) == 3 and answers.docs("b").tolist() == [0, 1]
    assert found(answers) == [(None, "a", 2), (None, "a", 1), ("b0", "b", 0), ("a0", "a", 0)]
    assert "is damaged" in answers.damaged["answers/x.parquet"]


def test_a_store_that_fails_is_not_damage(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "not now")

    answers = Answers(folder)
    monkeypatch.setattr("reports.store.read_result", fail)
    with pytest.raises(Exception, match="could not be read"):
        found(answers)
    assert not answers.damaged
