"""A root folder in an object store, or in whatever else pyarrow and fsspec open."""

from collections.abc import Sequence
from typing import Any

from pyarrow import fs as pafs

from reports.service.trees import Entry, Kind, Missing, Names, checked

_KINDS = {pafs.FileType.File: Kind.FILE, pafs.FileType.Directory: Kind.FOLDER}


class StoreTree:
    """Files below a path of a file system. Links, where it has any, are the file system's own affair."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """Take a pyarrow file system and the root's path in it."""
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        # fsspec's file systems know more of a file than what pyarrow asks them.
        self._inner = getattr(getattr(filesystem, "handler", None), "fs", None)

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order. Raises Missing or OSError."""
        self._forget()
        selector = pafs.FileSelector(self._path(folder), recursive=False, allow_not_found=not folder)
        try:
            found = self._filesystem.get_file_info(selector)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Missing from error
        return sorted(self._entry(info) for info in found)

    def open(self, file: Names) -> "StoreFile":
        """Open a file. Raises Missing or OSError."""
        if not file:
            raise Missing
        self._forget()
        entry = self.look(self._path(file))
        if entry is None or entry.kind is not Kind.FILE:
            raise Missing
        try:
            return StoreFile(self, self._filesystem.open_input_file(self._path(file)), self._path(file), entry)
        except FileNotFoundError as error:
            raise Missing from error

    def look(self, path: str) -> Entry | None:
        """Return what the file system says of a path now."""
        info = self._filesystem.get_file_info(path)
        return None if info.type == pafs.FileType.NotFound else self._entry(info)

    def _entry(self, info: Any) -> Entry:
        kind = _KINDS.get(info.type, Kind.OTHER)
        if kind is not Kind.FILE:
            return Entry(info.base_name, kind)
        known = info.mtime_ns if self._inner is None else self._inner.ukey(info.path)
        modified = info.mtime.timestamp() if info.mtime is not None else None
        return Entry(info.base_name, kind, info.size or 0, f"{info.size}:{known}", modified)

    def _forget(self) -> None:
        """Runs grow while they are looked at; fsspec would go on showing what it listed first."""
        if self._inner is not None:
            self._inner.invalidate_cache()

    def _path(self, names: Names) -> str:
        return "/".join([self._root, *checked(names)])


class StoreFile:
    """A file in a store, read in ranges."""

    def __init__(self, tree: StoreTree, file: Any, path: str, entry: Entry) -> None:
        self._tree = tree
        self._file = file
        self._path = path
        self.size = entry.size
        self.version = entry.version
        self.modified = entry.modified

    def read(self, start: int, count: int) -> bytes:
        """Read up to `count` bytes from `start`."""
        return bytes(self._file.read_at(count, start))

    def changed(self) -> bool:
        """Whether the store holds another file now: two reads may have seen two files."""
        now = self._tree.look(self._path)
        return now is None or now.version != self.version

    def close(self) -> None:
        """Close the file."""
        self._file.close()
