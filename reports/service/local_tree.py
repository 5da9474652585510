"""A root folder on this machine, walked name by name so that no symbolic link below it is ever followed."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from reports.service.trees import Entry, Kind, Missing, Names, checked

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Opening a pipe would wait for whoever writes into it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LocalTree:
    """Files below a folder of this machine; the folder itself may be a link."""

    def __init__(self, root: str) -> None:
        """Name the root; it is opened anew for every look, so that it may be replaced."""
        self._root = root

    def entries(self, folder: Names) -> Sequence[Entry]:
        """List a folder in name order. Raises Missing or OSError."""
        with self._folder(folder) as descriptor, os.scandir(descriptor) as found:
            return sorted(entry for item in found if (entry := _entry(item)) is not None)

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


class LocalFile:
    """A file that stays what it was when it was opened, unless somebody writes into it."""

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = status.st_size
        self.version = _version(status)
        self.modified: float | None = status.st_mtime

    def read(self, start: int, count: int) -> bytes:
        """Read up to `count` bytes from `start`."""
        return os.pread(self._file.fileno(), count, start)

    def changed(self) -> bool:
        """Whether somebody wrote into the file; one that was replaced stays as it was."""
        return _version(os.fstat(self._file.fileno())) != self.version

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: str, flags: int, folder: int | None) -> int:
    try:
        return os.open(path, flags, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing from error
    except OSError as error:
        # What O_NOFOLLOW says of a link; a socket; a name that cannot exist.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise Missing from error
        raise


def _entry(item: "os.DirEntry[str]") -> Entry | None:
    try:
        status = item.stat(follow_symlinks=False)
    except FileNotFoundError:  # gone since the folder was read
        return None
    if stat.S_ISREG(status.st_mode):
        return Entry(item.name, Kind.FILE, status.st_size, _version(status), status.st_mtime)
    if stat.S_ISDIR(status.st_mode):
        return Entry(item.name, Kind.FOLDER)
    return Entry(item.name, Kind.LINK if stat.S_ISLNK(status.st_mode) else Kind.OTHER)


def _version(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
