"""Files below the root as their contents: texts, plans, rows and footers of tables, checked once for each version."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import parquet as pq

from reports.locations import one_line
from reports.schemas import difference, fitted
from reports.service.tree import Missing, Names, OpenFile, Tree
from shortv.errors import Refused, ShortVError
from shortv.plan import Plan
from shortv.untrusted import read_parquet

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

    def get(self, key: Hashable, make: Callable[[], V], *, modified: float | None, lasts: Callable[[], bool]) -> V:
        """Return the value of a key. A new value is kept if its file is not recent and `lasts` agrees."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        if (modified is None or abs(time.time() - modified) > _SETTLED_S) and lasts():
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value."""
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
        opened = self._open(names)
        try:
            if opened.size > MAX_TEXT_BYTES:
                raise ShortVError(f"{shown(names)} has {opened.size} bytes, at most {MAX_TEXT_BYTES} are read")
            return opened.read(MAX_TEXT_BYTES)
        except OSError as error:
            raise self._failed(names, error) from error
        finally:
            opened.close()

    def plan(self, names: Names) -> Plan:
        """Read a plan. Raises Missing, or ShortVError with what is wrong."""
        try:
            return Plan.from_json(self.text(names))
        except Refused as error:
            raise ShortVError(f"{shown(names)}: {error}") from error

    def footer(self, names: Names, table: str, *, version: str, modified: float | None) -> Footer:
        """Check a Parquet file as far as its footer, or an earlier read, tells."""
        before = self.interrupted
        make = lambda: self._footer(names, table)  # noqa: E731
        return self._footers.get((names, version), make, modified=modified, lasts=lambda: self.interrupted == before)

    def _footer(self, names: Names, table: str) -> Footer:
        try:
            opened = self._open(names)
        except Missing:
            return Footer(None, "was removed, or is not a regular file")
        except ShortVError as error:
            return Footer(None, str(error).removeprefix(shown(names)).strip())
        try:
            file = pq.ParquetFile(opened.stream, pre_buffer=False)
            reason = difference(file.schema_arrow, table)
            return Footer(file.metadata.num_rows if reason is None else None, reason)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError):
                # pyarrow reports damaged files with OSError too, but only the file system's has a number.
                self.interrupted += 1
                if error.errno is not None:
                    return Footer(None, f"could not be read: {why(error)}")
            return Footer(None, f"is not a whole Parquet file: {one_line(error)}")
        finally:
            opened.close()

    def rows(self, names: Names, table: str) -> list[dict[str, Any]]:
        """Read a small table. Raises Missing, or ShortVError if it is too large or damaged; damage is remembered."""
        opened = self._open(names)
        try:
            found = read_parquet(opened.stream, what=shown(names), max_rows=MAX_ROWS, max_bytes=MAX_TABLE_BYTES)
            reason = difference(found.schema, table)
            if reason is not None:
                raise Refused(f"{shown(names)} {reason}")
            rows: list[dict[str, Any]] = fitted(found, table).to_pylist()
            return rows
        except Refused as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno is not None:
                raise self._failed(names, cause) from error
            reason = str(error).removeprefix(shown(names)).strip()
            self._footers.put((names, opened.version), Footer(None, reason))
            raise
        finally:
            opened.close()

    def _open(self, names: Names) -> OpenFile:
        try:
            return self.tree.open(names)
        except OSError as error:
            raise self._failed(names, error) from error

    def _failed(self, names: Names, error: OSError) -> ShortVError:
        self.interrupted += 1
        return ShortVError(f"{shown(names)} could not be read: {why(error)}")


def shown(names: Sequence[str]) -> str:
    """Return a path below the root for people; where the root is does not concern them."""
    return "/".join(names).encode(errors="replace").decode()


def why(error: OSError) -> str:
    """Return an error of a file system without the paths and addresses in its text."""
    return error.strerror or type(error).__name__
