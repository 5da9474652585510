"""Result folders, local or remote, in which no file is visible before it is whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs
from pyarrow import parquet as pq

from reports.locations import FILE_ERRORS, locate, one_line
from reports.schemas import read_result, schema_of, table_of
from shortv.atomic import is_leftover, remove_leftovers, replace_file
from shortv.errors import Refused, ShortVError
from shortv.untrusted import MAX_TEXT_BYTES, parse_json, read_parquet

_PROBE = "write-check"


class Folder:
    """A folder of result files under a local path or any URI that pyarrow or fsspec opens.

    Names inside it use forward slashes (`lc_samples/part-00000.parquet`). Every write is atomic: a reader, or the
    next run after a kill, sees the old file or the whole new one. Failures of the file system are raised as
    `ShortVError`, one line that names the file.
    """

    __slots__ = ("_filesystem", "_root", "local_path", "shown")

    def __init__(self, uri: "str | os.PathLike[str]") -> None:
        """Name the folder; nothing is made until it is used. Raises Refused for an unknown URI scheme."""
        location = locate(uri)
        self._filesystem = location.filesystem
        self._root = location.path
        self.local_path: Path | None = location.local
        self.shown = location.shown.rstrip("/") or "/"

    def __repr__(self) -> str:
        return f"Folder({self.shown!r})"

    def check_writable(self) -> None:
        """Make the folder, write and remove a probe file, and clear what killed writers left behind.

        Raises:
            Refused: the place is a file, cannot be made, or cannot be written.
        """
        if self._info("").type == pafs.FileType.File:
            raise Refused(f"{self.shown} is a file; give a folder for the results")
        try:
            if self.local_path is not None:
                self.local_path.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.local_path)
            self.write_bytes(_PROBE, b"shortv")
            self.delete(_PROBE)
        except (*FILE_ERRORS, ShortVError) as error:
            problem = f"results cannot be written to {self.shown}: {one_line(error)}"
            raise Refused(f"{problem}; choose another folder or free it") from error

    def write_bytes(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Write a file atomically, whole or from chunks. Raises ShortVError when the disk is full or not writable."""
        path, chunks = self._path(name), [data] if isinstance(data, bytes) else data
        with self._failing("written", name):
            if self.local_path is not None:
                replace_file(Path(path), chunks)
            else:
                self._put(path, chunks)

    def _put(self, path: str, chunks: Iterable[bytes]) -> None:
        if parent := path.rpartition("/")[0]:
            self._filesystem.create_dir(parent, recursive=True)
        try:
            with self._filesystem.open_output_stream(path) as stream:
                for chunk in chunks:
                    stream.write(chunk)
        except FILE_ERRORS:
            # Closing the stream may have published what was sent so far.
            if self._filesystem.get_file_info(path).type == pafs.FileType.File:
                self._filesystem.delete_file(path)
            raise

    def read_bytes(self, name: str, *, limit_bytes: int | None = MAX_TEXT_BYTES) -> bytes:
        """Read a whole file. Raises ShortVError when it is missing, cannot be read, or is longer than the limit."""
        with self._failing("read", name), self._filesystem.open_input_stream(self._path(name)) as stream:
            data = bytes(stream.readall() if limit_bytes is None else stream.read(limit_bytes + 1))
        if limit_bytes is not None and len(data) > limit_bytes:
            raise ShortVError(f"{self._shown(name)} is longer than {limit_bytes} bytes; it is not a file of a run")
        return data

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, indented, atomically. Raises ValueError for a value JSON does not have (NaN)."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(name, text.encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object. Raises ShortVError when it is missing, not JSON within bounds, or not an object."""
        value = parse_json(self.read_bytes(name), what=self._shown(name))
        if not isinstance(value, dict):
            raise ShortVError(f"{self._shown(name)} holds a JSON {type(value).__name__}, not an object")
        return value

    def write_table(self, name: str, rows: "pa.Table | Iterable[Any]") -> None:
        """Write a Parquet table under its fixed schema: `samples`, or a part such as `lc_samples/part-00000`.

        Rows are records (dataclasses, named tuples), mappings, or a table of the same columns.
        """
        schema = schema_of(name)
        table = rows.select(schema.names).cast(schema) if isinstance(rows, pa.Table) else table_of(name, rows)
        self.write_parquet(name, table)

    def write_parquet(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file of any schema."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(_parquet(name), sink.getvalue().to_pybytes())

    def read_parquet(self, name: str) -> pa.Table:
        """Read a Parquet file of any schema. Raises ShortVError when it is missing, damaged or too large."""
        name = _parquet(name)
        with self._failing("read", name), self._filesystem.open_input_file(self._path(name)) as stream:
            return read_parquet(stream, what=self._shown(name))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one table or part as `read_result` does. Raises ShortVError when it is missing, damaged or foreign."""
        file = _parquet(name)
        with self._failing("read", file), self._filesystem.open_input_file(self._path(file)) as stream:
            return read_result(stream, name, what=self._shown(file), columns=columns)

    def read_tables(self, name: str) -> pa.Table:
        """Read all parts of a table in name order as one; no part at all is the empty table."""
        parts = [self.read_table(part) for part in self.list(name) if part.endswith(".parquet")]
        return pa.concat_tables(parts) if parts else schema_of(name).empty_table()

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder of that name is there."""
        return bool(self._info(name).type != pafs.FileType.NotFound)

    def list(self, name: str = "") -> "list[str]":
        """List the files below a folder, sorted names relative to this one, without unfinished writes."""
        selector = pafs.FileSelector(self._path(name), recursive=True, allow_not_found=True)
        with self._failing("listed", name):
            infos = self._filesystem.get_file_info(selector)
        start = len(self._root.rstrip("/")) + 1
        return sorted(
            info.path[start:] for info in infos if info.type == pafs.FileType.File and not is_leftover(info.base_name)
        )

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all it holds; a missing one is fine. Raises ShortVError."""
        kind, path = self._info(name).type, self._path(name)
        with self._failing("removed", name):
            if kind == pafs.FileType.Directory:
                self._filesystem.delete_dir(path)
            elif kind == pafs.FileType.File:
                self._filesystem.delete_file(path)

    def _info(self, name: str) -> pafs.FileInfo:
        with self._failing("looked up", name):
            return self._filesystem.get_file_info(self._path(name))

    @contextmanager
    def _failing(self, done: str, name: str) -> Iterator[None]:
        """Raise the errors of the file system as one ShortVError that names the file."""
        try:
            yield
        except FILE_ERRORS as error:
            raise ShortVError(f"{self._shown(name)} could not be {done}: {one_line(error)}") from error

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is not a name inside a result folder")
        return f"{self._root.rstrip('/')}/{name}".rstrip("/") if name else self._root

    def _shown(self, name: str) -> str:
        return f"{self.shown}/{name}" if name else self.shown


def _parquet(name: str) -> str:
    return name if name.endswith(".parquet") else f"{name}.parquet"
