"""A folder of the driver's node on nodes that do not have it: read in pieces, written once per node."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortv.errors import ShortVError

CHUNK = 16 * 2**20
"""Bytes per message, and the size up to which a file's whole content enters the digest."""


def folder_files(folder: Path) -> list[str]:
    """Names of the files below a folder, sorted, without hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def folder_digest(name: str | Path) -> str | None:
    """SHA-256, in hex, of a folder: names and sizes, small files whole, large ones by their two ends.

    None for what is not a folder, such as a hub id.
    """
    if not (folder := Path(name).resolve()).is_dir():
        return None
    digest = hashlib.sha256()
    for file in folder_files(folder):
        size = (folder / file).stat().st_size
        digest.update(f"{file}\0{size}\0".encode())
        digest.update(_piece(folder / file, 0))
        if size > CHUNK:
            digest.update(_piece(folder / file, max(CHUNK, size - CHUNK)))
    return digest.hexdigest()


def _piece(path: Path, offset: int) -> bytes:
    """Up to CHUNK bytes of a file; nothing past its end."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFolder:
    """A folder as a worker gets it: where it is, its digest, and the id of the node that has it."""

    path: Path
    digest: str
    node: str

    def local(self) -> Path:
        """The folder on this node: the same path when it holds the same files, else a copy made once per node."""
        if folder_digest(self.path) == self.digest:
            return self.path
        copies = Path(tempfile.gettempdir()) / f"shortv-models-{os.getuid()}"
        copies.mkdir(mode=0o700, exist_ok=True)
        copy = copies / self.digest
        with (copies / f"{self.digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_dir():
                self._write(copy)
        return copy

    def _write(self, copy: Path) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there: Any = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node, soft=False)}
        files: Any = ray.remote(**there)(folder_files)
        piece: Any = ray.remote(**there)(_piece)
        temporary = copy.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        for name in ray.get(files.remote(self.path)):
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while data := ray.get(piece.remote(self.path / name, file.tell())):
                    file.write(data)
        if folder_digest(temporary) != self.digest:
            raise ShortVError(f"{self.path} has changed since this run began; run the command again")
        temporary.replace(copy)


def offer(name: str) -> ShippedFolder | None:
    """Offer a folder of this node to all nodes of the connected cluster; None for a hub id, which nodes load alone."""
    import ray

    digest = folder_digest(name)
    if digest is None:
        return None
    return ShippedFolder(path=Path(name).resolve(), digest=digest, node=ray.get_runtime_context().get_node_id())
