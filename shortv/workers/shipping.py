"""A local model folder on nodes that do not have it: read from the driver's node, written once per node."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 16 * 2**20
"""Bytes per message, and the size up to which a file's whole content enters the digest."""


def folder_digest(folder: Path) -> str:
    """SHA-256, in hex, of a model folder: names and sizes, small files whole, large ones by their two ends."""
    digest = hashlib.sha256()
    for name in folder_files(folder):
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(CHUNK))
            if size > CHUNK:
                file.seek(max(CHUNK, size - CHUNK))
                digest.update(file.read(CHUNK))
    return digest.hexdigest()


def folder_files(folder: Path) -> list[str]:
    """Names of the files below a folder, sorted, without hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


class FolderSource:
    """Reads pieces of a folder for other nodes; its actor lives on the driver's node."""

    def __init__(self, folder: str) -> None:
        """Serve the files below `folder`, and no others."""
        self._folder = Path(folder)
        self._names = folder_files(self._folder)

    def names(self) -> list[str]:
        """Names of the files to copy."""
        return self._names

    def read(self, name: str, offset: int) -> bytes:
        """Up to CHUNK bytes of a file; nothing past its end. Raises KeyError for a name that is not served."""
        if name not in self._names:
            raise KeyError(name)
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFolder:
    """A model folder as a worker gets it: where it is on the driver's node, and whom to ask for its content."""

    path: str
    digest: str
    source: Any

    def local(self) -> Path:
        """The folder on this node: the same path when it holds the same files, else a copy made once per node."""
        here = Path(self.path)
        if here.is_dir() and folder_digest(here) == self.digest:
            return here
        copies = Path(tempfile.gettempdir()) / f"shortv-models-{os.getuid()}"
        copies.mkdir(mode=0o700, exist_ok=True)
        copy = copies / self.digest
        with (copies / f"{self.digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_dir():
                self._write(copy)
        return copy

    def _write(self, copy: Path) -> None:
        temporary = copy.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        for name in _wait(self.source.names.remote()):
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.writelines(self._pieces(name))
        temporary.replace(copy)

    def _pieces(self, name: str) -> Iterator[bytes]:
        offset = 0
        while piece := _wait(self.source.read.remote(name, offset)):
            yield piece
            offset += len(piece)


def ship(folder: Path, digest: str) -> ShippedFolder:
    """Offer a folder of the driver's node to all nodes."""
    from shortv.workers.cluster import driver_actor

    source = driver_actor(FolderSource).remote(str(folder))
    return ShippedFolder(path=str(folder), digest=digest, source=source)


def offer(folder: Path | None, digest: str | None) -> ShippedFolder | None:
    """The same for a model that may be on the hub (None), without an actor where all workers are on this machine."""
    from shortv.workers.cluster import living_nodes

    if folder is None or digest is None:
        return None
    if len(living_nodes()) == 1 and "RAY_ADDRESS" not in os.environ:
        return ShippedFolder(path=str(folder), digest=digest, source=None)
    return ship(folder, digest)


def _wait(reference: Any) -> Any:
    import ray

    return ray.get(reference)
