"""One driver at a time on an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final

from reports.store import Folder
from shortv.errors import Refused, ShortVError

LOCK_NAME: Final = ".driver.lock"
"""A file of every local output folder that work was done in; it stays there, empty of meaning without its lock."""


@contextmanager
def one_driver(folder: Folder) -> Iterator[None]:
    """Hold the folder's lock, which ends with this process, however it ends.

    Local folders and file systems with locks have one. Object stores have none: there two drivers are not seen.

    Raises:
        Refused: another driver is at work in the folder.
    """
    try:
        file = _open_lock(folder)
    except OSError:
        # Where nothing can be written nothing will run, and finished results can still be shown.
        file = None
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise Refused(
                f"{folder.shown} is in use by {holder}; wait until it has ended, or choose another --output-path"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise ShortVError(f"{folder.shown} could not be locked: {error.strerror}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _open_lock(folder: Folder) -> IO[str] | None:
    if folder.local_path is None:
        return None
    folder.local_path.mkdir(parents=True, exist_ok=True)
    return (folder.local_path / LOCK_NAME).open("a+")
