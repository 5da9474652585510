"""The folder that is served: names without tricks below one root, and symbolic links never followed.

A root is a folder of this machine or of an object store. Both give `Entry` for what a folder contains and an open
file for a path; nothing above the root, hidden or special can be reached.
"""

import errno
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final, NamedTuple

from pyarrow import fs as pafs

from reports.locations import locate
from shortv.errors import Refused

Names = tuple[str, ...]
"""The path of a file or folder below the root, name by name; the root itself is empty."""
_LONGEST_NAME: Final = 255
# Separators of other systems, ends of C strings, and characters that cannot be printed.
_STRANGE: Final = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Opening a FIFO would wait for a writer.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Missing(Exception):
    """There is no such file or folder, or it may not be read; callers are not told which."""


class Kind(StrEnum):
    """What a name stands for."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "symbolic link"
    OTHER = "special file"


class Entry(NamedTuple):
    """One name in a folder. `version` changes with a file's content, as far as the store can tell."""

    name: str
    kind: Kind
    size: int = 0
    version: str = ""
    modified: float | None = None


class OpenFile(ABC):
    """An open file: its size and version at that time, and `stream`, a binary file object with `seek`."""

    stream: Any
    size: int
    version: str
    modified: float | None

    def read(self, limit: int) -> bytes:
        """Return the content, at most `limit` bytes. Raises OSError."""
        data: bytes = self.stream.read(limit)
        return data

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


class Tree(ABC):
    """A root folder."""

    @abstractmethod
    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, unaddressable names included. Raises Missing or OSError."""

    @abstractmethod
    def open(self, file: Names) -> OpenFile:
        """Open a regular file. Raises Missing or OSError."""


def is_addressable(name: str) -> bool:
    """Return whether a name can be part of a URL: not hidden, no `..`, no separator or control character."""
    return bool(name) and not name.startswith(".") and len(name) <= _LONGEST_NAME and not _STRANGE.search(name)


def checked(names: Names) -> Names:
    """Return the names. Raises Missing if one of them is not addressable."""
    if not all(is_addressable(name) for name in names):
        raise Missing
    return names


def open_tree(root: str) -> Tree:
    """Return the tree of a local path or URI. Raises Refused if it is not a folder."""
    location = locate(root)
    local = _local_path(location.filesystem, location.path)
    try:
        kind = location.filesystem.get_file_info(location.path).type
    except OSError as error:
        raise Refused(f"{location.shown} cannot be looked up ({type(error).__name__}); check the address") from error
    # An object store has no folder before there is a file in it.
    if kind == pafs.FileType.File or (local is not None and kind != pafs.FileType.Directory):
        found = "a file" if kind == pafs.FileType.File else "not there"
        raise Refused(f"{location.shown} is {found}; give the folder above the runs")
    return LocalTree(local) if local is not None else StoreTree(location.filesystem, location.path)


def _local_path(filesystem: Any, path: str) -> str | None:
    """Return the path on this machine, whichever library found it: both libraries would follow links."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return path
    inner = getattr(getattr(filesystem, "handler", None), "fs", None)
    protocols = getattr(inner, "protocol", ())
    names = (protocols,) if isinstance(protocols, str) else tuple(protocols)
    return os.path.abspath(path) if {"file", "local"} & set(names) else None


class LocalTree(Tree):
    """A folder of this machine, opened name by name so that no link below it is followed; it may be a link itself."""

    def __init__(self, root: str) -> None:
        self._root = root

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, unaddressable names included. Raises Missing or OSError."""
        with self._folder(folder) as descriptor, os.scandir(descriptor) as found:
            return sorted(entry for item in found if (entry := _local_entry(item)) is not None)

    def open(self, file: Names) -> "LocalFile":
        """Open a regular file. Raises Missing or OSError."""
        if not file:
            raise Missing
        with self._folder(file[:-1]) as folder:
            descriptor = _open(checked(file)[-1], _FILE, folder)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise Missing
        return LocalFile(descriptor, status)

    @contextmanager
    def _folder(self, names: Names) -> Iterator[int]:
        descriptor = _open(self._root, _FOLDER, None)
        try:
            for name in checked(names):
                inner = _open(name, _FOLDER | os.O_NOFOLLOW, descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)


class LocalFile(OpenFile):
    """A local file, which keeps its content when another file replaces it."""

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        self.stream = os.fdopen(descriptor, "rb")
        self.status = status
        self.size = status.st_size
        self.version = _version(status)
        self.modified = status.st_mtime

    @property
    def path(self) -> str:
        """A path to the open file itself, valid until it is closed, whatever its name stands for by then."""
        return f"/dev/fd/{self.stream.fileno()}"


def _open(path: str, flags: int, folder: int | None) -> int:
    try:
        return os.open(path, flags, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing from error
    except OSError as error:
        # A link under O_NOFOLLOW, a socket, a name that cannot exist.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise Missing from error
        raise


def _local_entry(item: "os.DirEntry[str]") -> Entry | None:
    try:
        status = item.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed since the folder was read
        return None
    if stat.S_ISREG(status.st_mode):
        return Entry(item.name, Kind.FILE, status.st_size, _version(status), status.st_mtime)
    if stat.S_ISDIR(status.st_mode):
        return Entry(item.name, Kind.FOLDER)
    return Entry(item.name, Kind.LINK if stat.S_ISLNK(status.st_mode) else Kind.OTHER)


def _version(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


class StoreTree(Tree):
    """A path of an object store, or of any other file system of pyarrow or fsspec, which resolves its own links."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        # fsspec's file systems know more about a file than pyarrow's interface to them.
        self._inner = getattr(getattr(filesystem, "handler", None), "fs", None)

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, unaddressable names included. Raises Missing or OSError."""
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
        path = self._path(file)
        entry = self.entry_at(path)
        if entry is None or entry.kind is not Kind.FILE:
            raise Missing
        try:
            return StoreFile(self, path, self._filesystem.open_input_file(path), entry)
        except FileNotFoundError as error:
            raise Missing from error

    def entry_at(self, path: str) -> Entry | None:
        """Return what the store has at a path now."""
        self._forget()
        info = self._filesystem.get_file_info(path)
        return None if info.type == pafs.FileType.NotFound else self._entry(info)

    def _entry(self, info: Any) -> Entry:
        if info.type != pafs.FileType.File:
            return Entry(info.base_name, Kind.FOLDER if info.type == pafs.FileType.Directory else Kind.OTHER)
        known = info.mtime_ns if self._inner is None else self._inner.ukey(info.path)
        modified = info.mtime.timestamp() if info.mtime is not None else None
        return Entry(info.base_name, Kind.FILE, info.size or 0, f"{info.size}:{known}", modified)

    def _forget(self) -> None:
        """Drop fsspec's cached listings: runs grow while they are looked at."""
        if self._inner is not None:
            self._inner.invalidate_cache()

    def _path(self, names: Names) -> str:
        return "/".join([self._root, *checked(names)])


class StoreFile(OpenFile):
    """A file in a store."""

    def __init__(self, tree: StoreTree, path: str, stream: Any, entry: Entry) -> None:
        self.stream = stream
        self.size = entry.size
        self.version = entry.version
        self.modified = entry.modified
        self._tree = tree
        self._path = path

    def changed(self) -> bool:
        """Return whether the store has another file there now: two reads may have read two files."""
        now = self._tree.entry_at(self._path)
        return now is None or now.version != self.version
