"""The questions whose answers a plan changed: compared with the full model's latest answers, a fair choice of them."""

from pathlib import Path
from typing import Any

import pytest

from reports.answers import Answers
from reports.changes import Compared, changes, documents_of, scores_of, with_questions
from reports.schemas import table_of
from reports.store import Folder
from tests.reports.test_answers import row, write

GROUP = Compared("org/m", "shapes", "acc", {"full": "a", "lc-2": "b"})


def scored(cell: str, doc: int, prediction: str | None, acc: float | None = 1.0, **others: Any) -> dict[str, Any]:
    """Return an answer with its scores: another metric that says nothing stands first."""
    scores = [{"metric": "length", "value": 9.0 - (acc or 0.0)}, {"metric": "acc", "value": acc}]
    return row(cell, doc, prediction, scores=scores, target="red", kind="colour") | others


def test_answers_that_got_worse_better_or_other_are_told_apart(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write(folder, 0, [scored("a", doc, "red", 1.0) for doc in range(6)] + [scored("b", 0, "old", 0.0)])
    write(folder, 1, [scored("a", 1, "blue", 0.0), scored("a", 5, None, error="too long", scores=[])])
    own = [scored("b", 0, "red"), scored("b", 1, "red"), scored("b", 2, "blue", 0.0), scored("b", 3, "Red")]
    own += [scored("b", 4, "none", None), scored("b", 5, "red"), scored("b", 77, "blue", 0.0)]
    write(folder, 2, own)
    rows = changes(Answers(folder), [GROUP, Compared("org/n", "shapes", "acc", {"lc-2": "b"})])
    names = ("doc", "change", "full_prediction", "prediction", "full_score", "score", "total")
    assert [tuple(one[name] for name in names) for one in rows] == [
        (2, "worse", "red", "blue", 1.0, 0.0, 1),
        (1, "better", "blue", "red", 0.0, 1.0, 1),
        (3, "other", "red", "Red", 1.0, 1.0, 2),
        (4, "other", "red", "none", 1.0, None, 2),
    ]
    assert documents_of(rows) == {"shapes": [1, 2, 3, 4]}
    asked = with_questions(rows, [{"task": "shapes", "doc": 2, "question": "Which colour?"}])
    assert [one["question"] for one in asked] == ["Which colour?", None, None, None]
    assert table_of("changes", asked)["plan"].unique().to_pylist() == ["lc-2"]
    # A recipe that asks for two documents, of a task that names no metric: its first one is the length.
    few = changes(Answers(folder), [GROUP._replace(num_docs=2, metric=None)])
    assert [(one["doc"], one["change"], one["score"]) for one in few] == [(1, "worse", 8.0)]


@pytest.mark.parametrize("sizes", [(90, 80, 70), (200, 2, 0), (3, 3, 3)])
def test_a_plan_has_a_few_rows_of_every_change_and_says_how_many_there_are(
    tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    folder, docs = Folder(tmp_path), iter(range(1000))
    kinds = [kind for kind, size in zip("wbo", sizes, strict=True) for _ in range(size)]
    for number, kind in enumerate(kinds):
        doc, before, after = next(docs), {"w": 1.0}.get(kind, 0.5), {"w": 0.0, "b": 1.0}.get(kind, 0.5)
        write(folder, number, [scored("a", doc, "red", before), scored("b", doc, "blue", after)])
    rows = changes(Answers(folder), [GROUP], most=20)
    found = {kind: [one for one in rows if one["change"] == kind] for kind in ("worse", "better", "other")}
    assert len(rows) == min(20, sum(sizes))
    for size, group in zip(sizes, found.values(), strict=True):
        assert bool(group) == bool(size) and {one["total"] for one in group} <= {size}
    assert [one["change"] for one in rows] == sorted((one["change"] for one in rows), key=list(found).index)
    if sizes[0] == 200:
        # Spread over the task, not its beginning.
        assert len(found["worse"]) == 18 and max(one["doc"] for one in found["worse"]) > 150


def test_scores_are_found_by_metric_in_rows_with_any_number_of_them() -> None:
    lists: list[list[dict[str, Any]]] = [[], [{"metric": "acc", "value": 0.5}], [{"metric": "x", "value": 1.0}]]
    lists += [[{"metric": "x", "value": 1.0}, {"metric": "acc", "value": None}]]
    column = table_of("answers", [row("a", doc, "", scores=scores) for doc, scores in enumerate(lists)])["scores"]
    assert scores_of(column, "acc").tolist() == pytest.approx(
        [float("nan"), 0.5, float("nan"), float("nan")], nan_ok=True
    )
    assert scores_of(column[1:], None).tolist() == [0.5, 1.0, 1.0]
    assert scores_of(column[2:], "x").tolist() == [1.0, 1.0] and len(scores_of(column[:0], None)) == 0
