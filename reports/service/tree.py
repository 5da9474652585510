"""The folder that is served: names without tricks below one root, and symbolic links never followed.

A root is a folder of this machine or of an object store. Both give `Entry` for what a folder contains and `OpenFile`
for a path; nothing above the root, hidden or special can be reached.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """An open file as it was found.

    `stream` is a binary file object with `seek`. `status` is set for local files, whose content stays when another file
    replaces them; `changed` tells whether a store has another file there now: two reads may have read two files.
    """

    stream: Any
    entry: Entry
    status: os.stat_result | None = None
    changed: Callable[[], bool] = lambda: False


def is_addressable(name: str) -> bool:
    """Return whether a name can be part of a URL: not hidden, no `..`, no separator or control character."""
    return bool(name) and not name.startswith(".") and len(name) <= _LONGEST_NAME and not _STRANGE.search(name)


def checked(names: Names) -> Names:
    """Return the names. Raises Missing if one of them is not addressable."""
    if not all(map(is_addressable, names)):
        raise Missing
    return names


class LocalTree:
    """A folder of this machine, opened name by name so that no link below it is followed; it may be a link itself."""

    def __init__(self, root: str) -> None:
        self._root = root

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, unaddressable names included. Raises Missing or OSError."""
        with self._folder(folder) as descriptor, os.scandir(descriptor) as found:
            return sorted(entry for item in found if (entry := _found(item)) is not None)

    def open(self, file: Names) -> OpenFile:
        """Open a regular file. Raises Missing or OSError."""
        *folder, name = checked(file)
        with self._folder(tuple(folder)) as inside:
            descriptor = _open(name, _FILE, inside)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise Missing
        return OpenFile(stream=os.fdopen(descriptor, "rb"), entry=_entry(name, status), status=status)

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


def _open(path: str, flags: int, folder: int | None) -> int:
    try:
        return os.open(path, flags, dir_fd=folder)
    except OSError as error:
        # ELOOP: a link under O_NOFOLLOW; ENXIO: a socket; ENAMETOOLONG: a name that cannot exist.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise Missing from error
        raise


def _found(item: "os.DirEntry[str]") -> Entry | None:
    try:
        return _entry(item.name, item.stat(follow_symlinks=False))
    except FileNotFoundError:  # removed since the folder was read
        return None


def _entry(name: str, status: os.stat_result) -> Entry:
    if stat.S_ISREG(status.st_mode):
        version = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
        return Entry(name, Kind.FILE, status.st_size, version, status.st_mtime)
    if stat.S_ISDIR(status.st_mode):
        return Entry(name, Kind.FOLDER)
    return Entry(name, Kind.LINK if stat.S_ISLNK(status.st_mode) else Kind.OTHER)


class StoreTree:
    """A path of an object store, or of any other file system of pyarrow or fsspec, which resolves its own links."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        # fsspec's file systems know more about a file than pyarrow's interface to them.
        self._inner = getattr(getattr(filesystem, "handler", None), "fs", None)

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, unaddressable names included. Raises Missing or OSError."""
        path = "/".join([self._root, *checked(folder)])
        return sorted(map(self._entry, self._look(pafs.FileSelector(path, allow_not_found=not folder))))

    def open(self, file: Names) -> OpenFile:
        """Open a file. Raises Missing or OSError."""
        path = "/".join([self._root, *checked(file)])
        entry = self._entry(self._look(path))
        if entry.kind is not Kind.FILE:
            raise Missing
        try:
            stream = self._filesystem.open_input_file(path)
        except FileNotFoundError as error:
            raise Missing from error
        return OpenFile(stream=stream, entry=entry, changed=lambda: self._entry(self._look(path)) != entry)

    def _look(self, place: Any) -> Any:
        """Return what the store has now: fsspec's cached listings are dropped, for runs grow while they are read."""
        if self._inner is not None:
            self._inner.invalidate_cache()
        try:
            return self._filesystem.get_file_info(place)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Missing from error

    def _entry(self, info: Any) -> Entry:
        if info.type != pafs.FileType.File:
            return Entry(info.base_name, Kind.FOLDER if info.type == pafs.FileType.Directory else Kind.OTHER)
        known = info.mtime_ns if self._inner is None else self._inner.ukey(info.path)
        modified = info.mtime.timestamp() if info.mtime is not None else None
        return Entry(info.base_name, Kind.FILE, info.size or 0, f"{info.size}:{known}", modified)


Tree = LocalTree | StoreTree


def open_tree(root: str) -> Tree:
    """Return the tree of a local path or URI. Raises Refused if it is not a folder."""
    filesystem, path, _, shown = locate(root)
    try:
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise Refused(f"{shown} cannot be looked up ({type(error).__name__}); check the address") from error
    protocols = getattr(getattr(getattr(filesystem, "handler", None), "fs", None), "protocol", ())
    # Whichever library found a path of this machine: both would follow links.
    local = isinstance(filesystem, pafs.LocalFileSystem) or not {"file", "local"}.isdisjoint(
        [protocols] if isinstance(protocols, str) else protocols
    )
    # An object store has no folder before there is a file in it.
    if kind == pafs.FileType.File or (local and kind != pafs.FileType.Directory):
        found = "a file" if kind == pafs.FileType.File else "not there"
        raise Refused(f"{shown} is {found}; give the folder above the runs")
    return LocalTree(path) if local else StoreTree(filesystem, path)
