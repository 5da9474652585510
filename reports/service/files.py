"""Files below the root as their contents: texts, plans, rows; digests and footers, found out once for each version."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa
from pyarrow import parquet as pq

from reports.locations import one_line
from reports.schemas import difference, fitted
from reports.service.memory import Memory
from reports.service.trees import Missing, Names, Opened, Tree
from shortv.errors import Refused, ShortVError
from shortv.plan import Plan
from shortv.planfile import parse_plan

CHUNK: Final = 2**20
LARGEST_TEXT: Final = 32 * 2**20
"""Manifests, plans and pages beyond this are refused: they are read whole."""
_NOT_WHOLE: Final = "is not a whole Parquet file: {}"
_MOST_DIGESTS: Final = 2**14
# Some 500 bytes each.
_MOST_FOOTERS: Final = 2**17


class Footer(NamedTuple):
    """What the end of a Parquet file says, or the reason why the file cannot be used, to stand after its name."""

    rows: int | None
    reason: str | None


class _Whole(NamedTuple):
    data: bytes
    version: str


class Files:
    """Reads below a root, without holding more than a chunk of a table.

    `interrupted` counts the reads that the file system refused: they may succeed the next time.
    """

    def __init__(self, tree: Tree) -> None:
        """Read files of this tree."""
        self.tree = tree
        self.interrupted = 0
        self._digests: Memory[bytes] = Memory(_MOST_DIGESTS)
        self._footers: Memory[Footer] = Memory(_MOST_FOOTERS)

    def text(self, names: Names) -> bytes:
        """Read a small file whole. Raises Missing, or ShortVError when it is too large or cannot be read."""
        return self._whole(names).data

    def plan(self, names: Names) -> Plan:
        """Read a plan. Raises Missing, or ShortVError with what is wrong."""
        text = self.text(names).decode(errors="replace")
        try:
            return parse_plan(text)
        except Refused as error:
            raise ShortVError(f"{shown(names)}: {error}") from error

    def _whole(self, names: Names) -> _Whole:
        try:
            opened = self.tree.open(names)
            try:
                if opened.size > LARGEST_TEXT:
                    raise ShortVError(f"{shown(names)} has {opened.size} bytes, at most {LARGEST_TEXT} are read")
                return _Whole(read_exactly(opened, 0, opened.size), opened.version)
            finally:
                opened.close()
        except OSError as error:
            self.interrupted += 1
            raise ShortVError(f"{shown(names)} could not be read: {why(error)}") from error

    def digest(self, names: Names, opened: Opened) -> bytes:
        """Return the SHA-256 of an open file. Raises OSError."""
        return self._digests.recall((names, opened.version), lambda: _digest(opened), modified=opened.modified)

    def footer(self, names: Names, opened: Opened, table: str) -> Footer:
        """Check an open Parquet file as far as its footer, or an earlier read, tells. Raises OSError."""
        return self._footers.recall((names, opened.version), lambda: _footer(opened, table), modified=opened.modified)

    def footer_at(self, names: Names, version: str, modified: float | None, table: str) -> Footer:
        """Return the footer of a file that was listed; it is opened only where this version is new."""

        def look() -> Footer:
            opened = self.tree.open(names)
            try:
                return _footer(opened, table)
            finally:
                opened.close()

        try:
            return self._footers.recall((names, version), look, modified=modified)
        except Missing:
            return Footer(None, "is not there any more, or is no regular file")
        except OSError as error:
            self.interrupted += 1
            return Footer(None, f"could not be read: {why(error)}")

    def rows(self, names: Names, table: str) -> list[dict[str, Any]]:
        """Read a small table. Raises Missing, or ShortVError when it is too large or damaged, which is remembered."""
        whole = self._whole(names)
        try:
            found = pq.ParquetFile(pa.BufferReader(whole.data), pre_buffer=False).read(use_threads=False)
            reason = difference(found.schema, table)
            rows: list[dict[str, Any]] = fitted(found, table).to_pylist() if reason is None else []
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = _NOT_WHOLE.format(one_line(error))
        if reason is not None:
            self._footers.keep((names, whole.version), Footer(None, reason))
            raise ShortVError(f"{shown(names)} {reason}")
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


def _footer(opened: Opened, table: str) -> Footer:
    raw = _Raw(opened)
    try:
        file = pq.ParquetFile(pa.PythonFile(raw, mode="r"), pre_buffer=False)
        reason = difference(file.schema_arrow, table)
        return Footer(file.metadata.num_rows if reason is None else None, reason)
    except (pa.ArrowException, OSError, ValueError) as error:
        if raw.failure is not None:
            raise raw.failure from error
        return Footer(None, _NOT_WHOLE.format(one_line(error)))


class _Raw(io.RawIOBase):
    """An open file as Python's libraries want it; it stays open when this is closed.

    `failure` is what the file system said where a library takes that for a damaged file.
    """

    def __init__(self, opened: Opened) -> None:
        self.failure: OSError | None = None
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
        try:
            data = self._opened.read(self._place, len(view))
        except OSError as error:
            self.failure = error
            raise
        view[: len(data)] = data
        self._place += len(data)
        return len(data)
