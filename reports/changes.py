"""Which answers a plan changed: questions to look at, chosen from all answers of a campaign with bounded memory."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.answers import MAX_DOCS, Answers, rows_by_cell

FULL: Final = "full"
CHANGES: Final = ("worse", "better", "other")
"""How an answer changed, by the task's main metric; `other` where both score the same, or one has no score."""
MOST: Final = 50
# Of the questions of a plan about as many are worse as better, and one in nine is other, where there are so many.
_STEPS: Final = (1, 1, 4)
# Numbers that are multiplied by the golden ratio, modulo 1, are spread evenly.
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)

Row = Mapping[str, Any]


class Compared(NamedTuple):
    """The cells of one model on one task: their keys by plan. Without a plan `full` nothing can be said of them.

    Without a `metric` the first one of each answer is compared. Documents from `num_docs` on do not count: a recipe may
    ask for fewer than an earlier one.
    """

    model: str
    task: str
    metric: str | None
    cells: Mapping[str, str]
    num_docs: int = MAX_DOCS


class _Full:
    """The full model's answers on a task: for each document whether it has one, its number, and its score."""

    def __init__(self, num_docs: int) -> None:
        self.has_D = np.zeros(num_docs, dtype=bool)
        self.answer_D = np.zeros(num_docs, dtype=np.int64)
        self.score_D = np.full(num_docs, np.nan)


def changes(answers: Answers, groups: Sequence[Compared], *, most: int = MOST) -> list[dict[str, Any]]:
    """Return rows of the table `changes`, in the order of the groups and their plans, without questions.

    A plan has at most `most` rows, the worse answers first; each says how many such answers there are in `total`. The
    same documents are preferred for all plans, spread over the task. A document that failed on one side did not change.
    """
    groups = [group for group in groups if FULL in group.cells]
    metrics = {cell: group.metric for group in groups for cell in group.cells.values()}
    full_of = {cell: group.cells[FULL] for group in groups for cell in group.cells.values()}
    fulls = {cell: _Full(_size(answers, cell, group)) for group in groups if (cell := group.cells[FULL])}
    for cell, doc_R, answer_R, score_R in _answered(answers, {cell: metrics[cell] for cell in fulls}):
        full, known_R = fulls[cell], doc_R < len(fulls[cell].has_D)
        docs = doc_R[known_R]
        full.has_D[docs], full.answer_D[docs], full.score_D[docs] = True, answer_R[known_R], score_R[known_R]
    plans = {cell: metrics[cell] for cell in full_of.keys() - fulls.keys()}
    # By cell, for each document 0 or the number of its change, counted from 1.
    changed = {cell: np.zeros(len(fulls[full_of[cell]].has_D), dtype=np.int8) for cell in plans}
    for cell, doc_R, answer_R, score_R in _answered(answers, plans):
        full, known_R = fulls[full_of[cell]], doc_R < len(changed[cell])
        docs, other, score = doc_R[known_R], answer_R[known_R], score_R[known_R]
        kind = np.where(score < full.score_D[docs], 1, np.where(score > full.score_D[docs], 2, 3))
        changed[cell][docs] = np.where(full.has_D[docs] & (other != full.answer_D[docs]), kind, 0)
    chosen = {cell: _choose(changed_D, most) for cell, changed_D in changed.items()}
    wanted = defaultdict[str, set[int]](set)
    for cell, some in chosen.items():
        wanted[cell].update(some)
        wanted[full_of[cell]].update(some)
    texts = _texts(answers, wanted, metrics)
    return [
        _row(group, plan, doc, texts[cell, doc], texts[group.cells[FULL], doc], changed[cell])
        for group in groups
        for plan, cell in group.cells.items()
        for doc in chosen.get(cell, ())
        if (cell, doc) in texts and (group.cells[FULL], doc) in texts
    ]


def _size(answers: Answers, cell: str, group: Compared) -> int:
    """Return how many documents of a cell can have an answer that counts."""
    return min(group.num_docs, int(answers.docs(cell).max(initial=-1)) + 1)


def documents_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Return the documents of rows of `changes` by task: those that need a thumbnail."""
    found = defaultdict[str, set[int]](set)
    for row in rows:
        found[row["task"]].add(row["doc"])
    return {task: sorted(docs) for task, docs in found.items()}


def with_questions(rows: Sequence[Row], thumbnails: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows of `changes` with the questions that rows of `thumbnails` have."""
    questions = {(row["task"], row["doc"]): row["question"] for row in thumbnails}
    return [{**row, "question": questions.get((row["task"], row["doc"]))} for row in rows]


def scores_of(scores: pa.ChunkedArray, metric: str | None) -> NDArray[np.float64]:
    """Return the values of one metric, or of the first one, of each row of a column of scores; NaN without one."""
    whole = scores.combine_chunks()
    pairs, row_P = pc.list_flatten(whole), pc.list_parent_indices(whole).to_numpy()
    if metric is None:
        own_P = np.unique(row_P, return_index=True)[1]
    else:
        own_P = np.flatnonzero(pc.equal(pairs.field("metric"), metric).to_numpy(zero_copy_only=False))
    found_R = np.full(len(scores), np.nan)
    found_R[row_P[own_P]] = pairs.field("value").to_numpy(zero_copy_only=False)[own_P]
    return found_R


def _answered(
    answers: Answers, metrics: Mapping[str, str | None]
) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield the documents of some cells that have an answer, part by part, with numbers for the answers and scores."""
    for table in answers.scan(["cell", "doc", "prediction", "scores", "error"], cells=metrics):
        table = table.filter(pc.is_null(table["error"]))
        # Only equality matters, and texts may be long.
        answer_R = np.fromiter(map(hash, table["prediction"].to_pylist()), np.int64, len(table))
        doc_R, by_metric = table["doc"].to_numpy(), dict[str | None, NDArray[np.float64]]()
        for cell, rows in rows_by_cell(table):
            metric = metrics[cell]
            if metric not in by_metric:
                by_metric[metric] = scores_of(table["scores"], metric)
            yield cell, doc_R[rows], answer_R[rows], by_metric[metric][rows]


def _choose(changed_D: NDArray[np.int8], most: int) -> list[int]:
    """Return at most so many documents whose answers changed, each kind of change together, within it in order."""
    places, docs, kinds = [], [], []
    for kind, step in enumerate(_STEPS, 1):
        found = np.flatnonzero(changed_D == kind)
        found = found[np.argsort(found.astype(np.uint64) * _GOLDEN, kind="stable")][:most]
        docs.append(found)
        kinds.append(np.full(len(found), kind))
        places.append(step * np.arange(len(found)))
    first = np.argsort(np.concatenate(places), kind="stable")[:most]
    taken, of_kind = np.concatenate(docs)[first], np.concatenate(kinds)[first]
    order: list[int] = taken[np.lexsort((taken, of_kind))].tolist()
    return order


def _texts(
    answers: Answers, wanted: Mapping[str, set[int]], metrics: Mapping[str, str | None]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the latest answers to some documents of some cells."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    columns = ["cell", "doc", "sample_id", "kind", "target", "prediction", "scores"]
    masks = {cell: np.array(sorted(docs)) for cell, docs in wanted.items() if docs}
    for table in answers.scan(columns, cells=masks):
        doc_R = table["doc"].to_numpy()
        for cell, rows in rows_by_cell(table):
            own = table.take(rows[np.isin(doc_R[rows], masks[cell])]) if cell in masks else table[:0]
            for row, score in zip(own.to_pylist(), scores_of(own["scores"], metrics[cell]).tolist(), strict=True):
                found[cell, row["doc"]] = row | {"score": None if np.isnan(score) else score}
    return found


def _row(group: Compared, plan: str, doc: int, own: Row, full: Row, changed_D: NDArray[np.int8]) -> dict[str, Any]:
    kind = int(changed_D[doc])
    return {
        **{"model": group.model, "task": group.task, "plan": plan, "doc": doc, "question": None},
        **{name: own[name] for name in ("sample_id", "kind", "target", "prediction", "score")},
        **{"full_prediction": full["prediction"], "full_score": full["score"]},
        **{"change": CHANGES[kind - 1], "total": int(np.count_nonzero(changed_D == kind))},
    }
