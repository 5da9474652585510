"""The folder of a campaign: append-only parts with answers and measured speeds, and what of them is there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.answers import Answers
from reports.changes import Compared, changes, with_questions
from reports.schemas import schema_of
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.workers.campaign.cells import Group
from shortv.workers.campaign.producer import UnitResult, parquet_of
from shortv.workers.campaign.units import SHARD

TABLES: Final = ("cells", "metrics", "comparisons", "speed")
_PART: Final = re.compile(r"\w+/part-(\d{6,9})\.parquet")


class JudgeReplies:
    """The replies of LLM judges in the parts `judge/`, found by task and document.

    A part that cannot be read counts as missing: its calls are made again. `damaged` says why, by name.
    """

    def __init__(self, folder: Folder) -> None:
        """Find the replies that are there. Raises ShortVError when the folder cannot be read."""
        self.folder = folder
        self.damaged: dict[str, str] = {}
        # The parts that have replies about the documents of a shard; the shard of a task's aggregation is None.
        self._parts: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
        for name in folder.list("judge"):
            self.update(name)

    def update(self, name: str) -> None:
        """Take in a part."""
        found = {(row["task"], _shard(row["doc"])) for row in self._rows(name, ("task", "doc"))}
        for key in found:
            self._parts[key].append(name)

    def of(self, task: str, docs: Iterable[int | None]) -> dict[str, str]:
        """Return the replies about documents of a task, and with None about its aggregation, by digest."""
        wanted = set(docs)
        names = {name for shard in {_shard(doc) for doc in wanted} for name in self._parts.get((task, shard), ())}
        return {
            row["digest"]: row["body"]
            for name in sorted(names)
            for row in self._rows(name)
            if row["task"] == task and row["doc"] in wanted
        }

    def _rows(self, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        try:
            return list(self.folder.read_table(name, columns).to_pylist())
        except (ShortVError, ValueError) as error:
            self.damaged[name] = str(error) if isinstance(error, ShortVError) else f"{name} is damaged"
            return []


def _shard(doc: int | None) -> int | None:
    return None if doc is None else doc // SHARD


class CampaignFolder:
    """Reads and writes the parts and tables of a campaign.

    A unit has one part, `answers/part-NNNNNN.parquet`; the speed of a group's plans is one part of `measured/`, and the
    judge's replies about a unit are one of `judge/`. Parts are numbered in the order in which they are committed, and a
    later row replaces an earlier one. Tables are made from parts.
    """

    def __init__(self, folder: Folder) -> None:
        """Find the parts that are there. Raises ShortVError when the folder cannot be read."""
        self.folder = folder
        self.answers = Answers(folder)
        self.judged = JudgeReplies(folder)
        self._next = {name: 1 + max([0, *self._numbers(name)]) for name in ("answers", "measured", "judge")}

    @property
    def damaged(self) -> Mapping[str, str]:
        """Why parts cannot be read, by name."""
        return {**self.answers.damaged, **self.judged.damaged}

    def _numbers(self, name: str) -> list[int]:
        found = map(_PART.fullmatch, self.folder.list(name))
        return [int(match[1]) for match in found if match]

    def set_damaged_aside(self) -> None:
        """Move the parts that cannot be read into the folder `damaged`; what they held is asked again."""
        for name in self.damaged:
            self.folder.write_bytes(f"damaged/{name}", self.folder.read_bytes(name, limit_bytes=None))
            self.folder.delete(name)

    def missing(self, group: Group, *, retry_failed: bool) -> dict[str, NDArray[np.bool_]]:
        """Return which documents each cell of a group lacks, by key, and those that failed if they are to be retried.

        An answer to a document that has changed since is missing; one whose scoring failed is there (`unscored`).
        """
        keys, count = group.distinct.keys(), group.task.num_docs
        missing = {key: np.ones(count, bool) for key in keys}
        if not keys & set(self.answers.cells):
            return missing
        digests = group.task.document_digests
        for part in self.answers.scan(("cell", "doc", "doc_digest", "error", "responses"), cells=keys):
            failed = pc.and_(pc.is_valid(part["error"]), pc.is_null(part["responses"]))
            failed_R = failed.to_numpy(zero_copy_only=False)
            doc_R, digest_R = part["doc"].to_numpy(), part["doc_digest"].to_numpy()
            for key in keys:
                own_R = pc.equal(part["cell"], key).to_numpy(zero_copy_only=False) & (doc_R < count)
                own_R &= ~(failed_R & retry_failed)
                doc = doc_R[own_R]
                missing[key][doc[digests[doc] == digest_R[own_R]]] = False
        return missing

    def unscored(self, group: Group) -> list[dict[str, Any]]:
        """Return the answers of a group whose scoring failed, so that they can be scored again without being asked."""
        digests, keys = group.task.document_digests, group.distinct.keys()
        found = [
            row
            for part in self.answers.scan(schema_of("answers").names, cells=keys)
            for row in part.filter(pc.is_valid(part["responses"])).to_pylist()
        ]
        return [row for row in found if row["doc"] < len(digests) and digests[row["doc"]] == row["doc_digest"]]

    def commit(self, result: UnitResult) -> None:
        """Write a finished unit, its answers last."""
        if result.judged is not None:
            self._commit_judged(result.judged)
        self.folder.write_bytes(f"{self._name('answers')}.parquet", result.part)

    def commit_judged(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write replies of a judge."""
        if rows:
            self._commit_judged(parquet_of("judge", rows))

    def _commit_judged(self, part: bytes) -> None:
        name = f"{self._name('judge')}.parquet"
        self.folder.write_bytes(name, part)
        self.judged.update(name)

    def commit_measured(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the measured speeds of a group."""
        self.folder.write_table(self._name("measured"), rows)

    def _name(self, table: str) -> str:
        number = self._next[table]
        self._next[table] = number + 1
        return f"{table}/part-{number:06d}"

    def measured(self) -> dict[str, dict[str, Any]]:
        """Return the last measured speed of each cell, by key."""
        return {row["cell"]: row for row in self.folder.read_tables("measured").to_pylist()}

    def changes(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Return rows of the table `changes`, without questions."""
        self.answers.update()
        compared = [
            Compared(
                model=group.model.name,
                task=group.task.name,
                metric=group.task.main_metric,
                cells={cell.entry.name: cell.key for cell in group.cells if cell.entry.same_as is None},
                num_docs=group.task.num_docs,
            )
            for group in groups
        ]
        return changes(self.answers, compared)

    def thumbnails(self) -> list[dict[str, Any]]:
        """Return the rows of the table `thumbnails` that are there."""
        try:
            return list(self.folder.read_table("thumbnails").to_pylist())
        except ShortVError:  # none yet, or damaged: they are made again
            return []

    def write_changes(self, rows: Sequence[Mapping[str, Any]], thumbnails: Sequence[Mapping[str, Any]]) -> None:
        """Write the tables `thumbnails` and `changes`."""
        self.folder.write_table("thumbnails", thumbnails)
        self.folder.write_table("changes", with_questions(rows, thumbnails))

    def write_tables(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Replace all tables of the campaign, one after the other."""
        for name in TABLES:
            self.folder.write_table(name, tables[name])

    def read_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of all tables."""
        return {name: self.folder.read_table(name).to_pylist() for name in TABLES}

    def has_tables(self) -> bool:
        """Whether all tables are there."""
        return all(self.folder.exists(f"{name}.parquet") for name in TABLES)
