"""Files below the root as their contents: digests and Parquet footers, found out once for each version."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa
from pyarrow import parquet as pq

from reports.locations import one_line
from reports.service.memory import Memory
from reports.service.trees import Missing, Names, Opened, Tree
from reports.store import check_schema
from shortv.errors import ShortVError

CHUNK: Final = 2**20
LARGEST_TEXT: Final = 32 * 2**20
"""Manifests, plans and pages beyond this are refused: they are read whole."""


class Footer(NamedTuple):
    """What the end of a Parquet file says, or why the file cannot be used."""

    rows: int | None
    problem: str | None


class Files:
    """Reads below a root, without holding more than a chunk of a table."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._digests: Memory[bytes] = Memory()
        self._footers: Memory[Footer] = Memory()

    def text(self, names: Names) -> bytes:
        """Read a small file whole. Raises Missing, or ShortVError when it is too large or cannot be read."""
        try:
            opened = self.tree.open(names)
            try:
                if opened.size > LARGEST_TEXT:
                    raise ShortVError(f"{shown(names)} has {opened.size} bytes, at most {LARGEST_TEXT} are read")
                return read_exactly(opened, 0, opened.size)
            finally:
                opened.close()
        except OSError as error:
            raise ShortVError(f"{shown(names)} could not be read: {why(error)}") from error

    def digest(self, names: Names, opened: Opened) -> bytes:
        """Return the SHA-256 of an open file. Raises OSError."""
        return self._digests.recall((names, opened.version), lambda: _digest(opened), modified=opened.modified)

    def footer(self, names: Names, opened: Opened, table: str) -> Footer:
        """Check an open Parquet file as far as its footer tells."""
        key = (names, opened.version)
        return self._footers.recall(key, lambda: _footer(names, opened, table), modified=opened.modified)

    def footer_at(self, names: Names, version: str, modified: float | None, table: str) -> Footer:
        """Return the footer of a file that was listed; it is opened only where this version is new."""

        def look() -> Footer:
            opened = self.tree.open(names)
            try:
                return _footer(names, opened, table)
            finally:
                opened.close()

        try:
            return self._footers.recall((names, version), look, modified=modified)
        except Missing:
            return Footer(None, f"{shown(names)} is not there any more, or is no regular file")
        except OSError as error:
            return Footer(None, f"{shown(names)} could not be read: {why(error)}")

    def rows(self, names: Names, table: str) -> list[dict[str, Any]]:
        """Read a small table. Raises Missing, or ShortVError when it is damaged or too large."""
        data = self.text(names)
        try:
            found = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShortVError(f"{shown(names)} is not a whole Parquet file: {one_line(error)}") from error
        check_schema(found.schema, table, shown(names))
        rows: list[dict[str, Any]] = found.to_pylist()
        return rows


def shown(names: Sequence[str]) -> str:
    """Return a path below the root for people; where the root is does not concern them."""
    return "/".join(names).encode(errors="replace").decode()


def why(error: OSError) -> str:
    """Return an error of a file system without the paths and addresses in its text."""
    return error.strerror or type(error).__name__


def read_exactly(opened: Opened, start: int, count: int) -> bytes:
    """Read `count` bytes. Raises OSError when the file ends before them."""
    pieces = []
    while count:
        piece = opened.read(start, count)
        if not piece:
            raise OSError(None, "the file became shorter while it was read")
        pieces.append(piece)
        start, count = start + len(piece), count - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _digest(opened: Opened) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, opened.size, CHUNK):
        digest.update(read_exactly(opened, start, min(CHUNK, opened.size - start)))
    return digest.digest()


def _footer(names: Names, opened: Opened, table: str) -> Footer:
    try:
        file = pq.ParquetFile(pa.PythonFile(_Raw(opened), mode="r"), pre_buffer=False)
        check_schema(file.schema_arrow, table, shown(names))
    except (pa.ArrowException, OSError, ValueError) as error:
        return Footer(None, f"{shown(names)} is not a whole Parquet file: {one_line(error)}")
    except ShortVError as error:
        return Footer(None, str(error))
    return Footer(file.metadata.num_rows, None)


class _Raw(io.RawIOBase):
    """An open file as Python's libraries want it; it stays open when this is closed."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._opened.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._opened.read(self._place, len(view))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)
