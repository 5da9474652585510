"""Files below the root as their contents: texts, plans, rows and footers of tables, checked once for each version."""

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Generic, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import parquet as pq

from reports.locations import one_line
from reports.schemas import difference, read_result
from reports.service.tree import Entry, Missing, Names, OpenFile, Tree
from shortv.errors import Refused, ShortVError
from shortv.plan import Plan

MAX_TEXT_BYTES: Final = 32 * 2**20
"""Manifests, plans and pages beyond this are refused: they are read whole."""
MAX_ROWS: Final = 50_000
MAX_TABLE_BYTES: Final = 64 * 2**20
"""Bounds on a table whose rows are read for the list, after decompression."""
# Some 500 bytes each; a list of very many parts must find all of them.
_MAX_FOOTERS: Final = 2**17
# A store's clock may tick once a second: two contents within one second look like one.
_SETTLED_S: Final = 2.0

V = TypeVar("V")


class Cache(Generic[V]):
    """The values of the `size` most recently used keys; a key names a file and its version."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """Return the value of a key, None if it is not known."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: V, *, modified: float | None) -> None:
        """Keep a value, unless its file was modified so recently that other content may have the same version."""
        if modified is not None and abs(time.time() - modified) <= _SETTLED_S:
            return
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)


class Footer(NamedTuple):
    """The rows that the end of a Parquet file declares, or why the file cannot be used, to be read after its name."""

    rows: int | None
    reason: str | None


class Files:
    """Reads files below a root. `interrupted` counts failed reads that may succeed the next time."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.interrupted = 0
        self._footers: Cache[Footer] = Cache(_MAX_FOOTERS)

    def text(self, names: Names) -> bytes:
        """Read a small file whole. Raises Missing, or ShortVError if it is too large or cannot be read."""
        with self._opened(names) as opened:
            if opened.entry.size > MAX_TEXT_BYTES:
                raise ShortVError(f"{shown(names)} has {opened.entry.size} bytes, at most {MAX_TEXT_BYTES} are read")
            return bytes(opened.stream.read(MAX_TEXT_BYTES))

    def plan(self, names: Names) -> Plan:
        """Read a plan. Raises Missing, or ShortVError with what is wrong."""
        try:
            return Plan.from_json(self.text(names))
        except Refused as error:
            raise ShortVError(f"{shown(names)} is not usable: {error}") from error

    def footer(self, names: Names, table: str, entry: Entry) -> Footer:
        """Check a Parquet file as far as its footer, or an earlier read, tells."""
        footer = self._footers.get((names, entry.version))
        if footer is not None:
            return footer
        try:
            with self._opened(names) as opened:
                footer = self._footer(opened, names, table)
        except Missing:
            return Footer(None, "was removed, or is not a regular file")
        except ShortVError as error:
            return Footer(None, _reason(names, error))
        self._footers.put((names, entry.version), footer, modified=entry.modified)
        return footer

    def rows(self, names: Names, table: str) -> list[dict[str, Any]]:
        """Read a small table. Raises Missing, or ShortVError if it is too large or damaged; damage is remembered."""
        with self._opened(names) as opened:
            try:
                bounds: dict[str, Any] = {"max_rows": MAX_ROWS, "max_bytes": MAX_TABLE_BYTES}
                rows: list[dict[str, Any]] = read_result(opened.stream, table, what=shown(names), **bounds).to_pylist()
                return rows
            except ShortVError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno is not None:
                    raise cause from error
                key = (names, opened.entry.version)
                self._footers.put(key, Footer(None, _reason(names, error)), modified=None)
                raise

    def _footer(self, opened: OpenFile, names: Names, table: str) -> Footer:
        try:
            file = pq.ParquetFile(opened.stream, pre_buffer=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            # pyarrow reports damage with OSError too, but only the errors of the file system have a number.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = f"is not a whole Parquet file: {one_line(error)}"
            if not isinstance(error, OSError):
                return Footer(None, problem)
            # It may still be the store's: the next list tries again.
            self.interrupted += 1
            raise ShortVError(f"{shown(names)} {problem}") from error
        reason = difference(file.schema_arrow, table)
        return Footer(file.metadata.num_rows if reason is None else None, reason)

    @contextmanager
    def _opened(self, names: Names) -> Iterator[OpenFile]:
        """Open a file for the block. Raises Missing, or ShortVError for errors of the file system."""
        try:
            opened = self.tree.open(names)
            with opened.stream:
                yield opened
        except OSError as error:
            self.interrupted += 1
            raise ShortVError(f"{shown(names)} could not be read: {why(error)}") from error


def _reason(names: Names, error: ShortVError) -> str:
    return str(error).removeprefix(shown(names)).strip()


def shown(names: Sequence[str]) -> str:
    """Return a path below the root for people; where the root is does not concern them."""
    return "/".join(names).encode(errors="replace").decode()


def why(error: OSError) -> str:
    """Return an error of a file system without the paths and addresses in its text."""
    return error.strerror or type(error).__name__
