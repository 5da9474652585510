"""Atomic replacement of local files, and removal of what killed writers left behind."""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

_LEFTOVER = re.compile(r"^\..+\.[0-9a-f]{16}\.shortv-tmp$")


def is_leftover(name: str) -> bool:
    """Tell whether a file name is the temporary name of an unfinished write."""
    return bool(_LEFTOVER.match(name))


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write bytes or chunks of them under a temporary name in the folder, force them to disk, then rename into place.

    Raises:
        OSError: the disk is full or the folder not writable; no temporary file is left and an old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.shortv-tmp")
    try:
        with temporary.open("xb") as stream:
            # The lock tells remove_leftovers that this writer lives; not every file system has locks.
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for chunk in [data] if isinstance(data, bytes) else data:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files of writers that no longer live, below a folder; return what was removed."""
    orphans = [path for path in folder.rglob(".*.shortv-tmp") if is_leftover(path.name) and _is_orphan(path)]
    for path in orphans:
        path.unlink(missing_ok=True)
    return orphans


def _is_orphan(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
