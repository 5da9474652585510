"""The answers of a campaign, read part by part: bounded memory, and of a document answered twice the later answer."""

from collections.abc import Collection, Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.locations import one_line
from reports.store import Folder
from shortv.errors import ShortVError

PARTS: Final = "answers"
MAX_DOCS: Final = 2**24
"""Positions of documents from here on mean a damaged part: an index of the positions is kept for each cell."""
_WHERE: Final = ("cell", "doc")


class Answers:
    """The parts of the table `answers` of a campaign folder, in the order of their names.

    A row of a later part replaces the row of the same cell and document in an earlier one. Which rows are the latest
    is known from one pass over the columns `cell` and `doc`; it takes four bytes for each of them. `damaged` says, by
    name, why parts cannot be read: they count as missing.
    """

    def __init__(self, folder: Folder) -> None:
        """Find the latest answers of a folder. Raises ShortVError when the store cannot be reached."""
        self.folder = folder
        self.damaged: dict[str, str] = {}
        self._cells_of: dict[str, frozenset[str]] = {}
        self._first_row: dict[str, int] = {}
        self._rows = 0
        # By cell, for each document the row of its latest answer, counted over all parts; -1 where it has none.
        self._latest: dict[str, NDArray[np.int32]] = {}
        self.update()

    @property
    def parts(self) -> Sequence[str]:
        """The names of the parts that can be read, such as `answers/part-000000.parquet`."""
        return [name for name in self._cells_of if name not in self.damaged]

    @property
    def cells(self) -> Collection[str]:
        """The keys of the cells that have answers."""
        return self._latest.keys()

    def docs(self, cell: str) -> NDArray[np.int32]:
        """Return the documents that have an answer (or an error) in a cell, in ascending order."""
        return np.flatnonzero(self._latest.get(cell, np.empty(0)) >= 0).astype(np.int32)

    def update(self) -> None:
        """Take in parts that were written since; their names must follow all earlier ones."""
        for name in self.folder.list(PARTS):
            if name.endswith(".parquet") and name not in self._cells_of and name not in self.damaged:
                self._take_in(name)

    def scan(self, columns: Sequence[str], *, cells: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Yield these columns of the latest answers, of some cells or all, a table for each part that has any.

        A part whose damage is found only now is added to `damaged` and skipped. Raises ShortVError when the store
        cannot be reached.
        """
        for name in self.parts:
            wanted = self._cells_of[name] if cells is None else self._cells_of[name].intersection(cells)
            table = self._read(name, list(dict.fromkeys((*columns, *_WHERE)))) if wanted else None
            if table is None:
                continue
            latest_R = np.zeros(len(table), dtype=bool)
            for cell, rows in rows_by_cell(table):
                if cell in wanted:
                    latest_R[rows] = self._latest[cell][table["doc"].to_numpy()[rows]] == rows + self._first_row[name]
            if latest_R.any():
                yield table.select(columns) if latest_R.all() else table.select(columns).filter(pa.array(latest_R))

    def _take_in(self, name: str) -> None:
        table = self._read(name, _WHERE)
        if table is None:
            return
        doc_R = table["doc"].to_numpy()
        strange = doc_R[(doc_R < 0) | (doc_R >= MAX_DOCS)]
        if len(strange):
            self.damaged[name] = f"{self._shown(name)} has the document {strange[0]}, which no task has; remove it"
            return
        found = dict(rows_by_cell(table))
        for cell, rows in found.items():
            latest, docs = self._latest.get(cell, np.empty(0, dtype=np.int32)), doc_R[rows]
            if (missing := int(docs.max()) + 1 - len(latest)) > 0:
                latest = np.pad(latest, (0, max(missing, len(latest) // 2)), constant_values=-1)
            # Of a document that is twice in one part, the later row stays: numpy assigns in order.
            latest[docs] = rows + self._rows
            self._latest[cell] = latest
        self._cells_of[name], self._first_row[name] = frozenset(found), self._rows
        self._rows += len(table)

    def _read(self, name: str, columns: Sequence[str]) -> pa.Table | None:
        try:
            table = self.folder.read_table(name, columns)
            # One changed byte can leave a file readable but its text invalid UTF-8.
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            self.damaged[name] = f"{self._shown(name)} is damaged: {one_line(error)}"
        except ShortVError as error:
            cause = error.__cause__
            # Damage is reported with OSError too, but only the errors of the file system have a number.
            if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
                raise
            self.damaged[name] = str(error)
        else:
            return table
        return None

    def _shown(self, name: str) -> str:
        return f"{self.folder.shown}/{name}"


def rows_by_cell(table: pa.Table) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield the cells of a part, and the rows of each."""
    encoded = pc.dictionary_encode(table["cell"]).combine_chunks()
    codes_R, cells = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    for code, cell in enumerate(cells):
        yield cell, np.flatnonzero(codes_R == code)
