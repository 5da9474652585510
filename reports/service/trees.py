"""Reading below one root folder and nowhere else: names without tricks, symbolic links never followed."""

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from pyarrow import fs as pafs

from reports.locations import locate
from shortv.errors import Refused

Names = tuple[str, ...]
"""The path of a file or folder below the root, name by name; the root itself is empty."""
_LONGEST_NAME: Final = 255
# Separators of other systems, ends of C strings, and what is not printed.
_STRANGE: Final = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Kind(StrEnum):
    """What stands under a name."""

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


class Opened(Protocol):
    """An open file: its size, the version that it had when it was opened, and its bytes from any place."""

    size: int
    version: str
    modified: float | None

    def read(self, start: int, count: int) -> bytes:
        """Read up to `count` bytes. Raises OSError."""
        ...

    def changed(self) -> bool:
        """Whether the file is no longer the one that was opened."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class Tree(Protocol):
    """A root folder, local or in an object store."""

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order, names that cannot be addressed included. Raises Missing or OSError."""
        ...

    def open(self, file: Names) -> Opened:
        """Open a regular file. Raises Missing or OSError."""
        ...


class Missing(Exception):
    """There is no such file or folder that may be read; why not is nobody's business."""


def is_addressable(name: str) -> bool:
    """Whether a name can stand in a URL of the service: not hidden, no `..`, no separator or control character."""
    return bool(name) and not name.startswith(".") and len(name) <= _LONGEST_NAME and not _STRANGE.search(name)


def checked(names: Names) -> Names:
    """Return the names. Raises Missing when one of them may not be asked for."""
    if not all(is_addressable(name) for name in names):
        raise Missing
    return names


def open_tree(root: str) -> Tree:
    """Find the tree of a local path or URI. Raises Refused when it is not a folder."""
    from reports.service.local_tree import LocalTree
    from reports.service.store_tree import StoreTree

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
    """The path on this machine, through whichever library it was found: links are followed by both."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return path
    inner = getattr(getattr(filesystem, "handler", None), "fs", None)
    protocols = getattr(inner, "protocol", ())
    names = (protocols,) if isinstance(protocols, str) else tuple(protocols)
    return os.path.abspath(path) if {"file", "local"} & set(names) else None
