"""Checkpoints of a training: directories that Ray Train stores in the run folder, of safetensors and JSON alone.

A checkpoint has the state, a record of the steps so far and, after the last step, `result/` with the learned parts and
their plans. Ray Train copies files one by one, so a checkpoint counts only when every file that its record lists is
there in its full size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reports.locations import locate, one_line
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.untrusted import parse_json

CHECKPOINTS = "checkpoints"
"""Folder of a run folder that Ray Train stores checkpoints in, by attempt."""
RESULT = "result"
_RECORD = "record.json"
_RECORD_BYTES = 2**30
_FILE_BYTES = 2**30
"""Size up to which tensors share a file: safetensors copies a file's tensors while it writes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint in storage."""

    path: str
    """Its directory on the file system of the run folder."""
    step: int
    """Finished steps."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of the table `training` up to that step."""
    errors: Sequence[Mapping[str, Any]]
    """Rows of the table `errors`: samples that could not be used so far."""


def write_checkpoint(
    place: Path,
    state: Mapping[str, Tensor],
    *,
    step: int,
    identity: str,
    rows: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
) -> None:
    """Write the state and the record; files that are there already belong to the checkpoint.

    Args:
        identity: digest of the training's arguments.
        rows: rows of the table `training`.
        errors: rows of the table `errors`.
    """
    for number, group in enumerate(_groups(state)):
        save_file(group, place / f"state-{number:05d}.safetensors")
    files = {path.relative_to(place).as_posix(): path.stat().st_size for path in place.rglob("*") if path.is_file()}
    record = {"step": step, "identity": identity, "files": files, "rows": rows, "errors": errors}
    (place / _RECORD).write_text(json.dumps(record, allow_nan=False))


def _groups(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if group and sum(each.nbytes for each in group.values()) + tensor.nbytes > _FILE_BYTES:
            yield group
            group = {}
        group[name] = tensor
    yield group


def read_state(place: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint that was copied to `place`. Raises ShortVError when a file is damaged."""
    try:
        return {name: tensor for path in sorted(place.glob("state-*")) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ShortVError(f"the checkpoint {place} is damaged: {error}; delete it to go on from before it") from error


def latest_checkpoint(uri: str, identity: str) -> Checkpoint | None:
    """Find the whole checkpoint with the most steps in a run folder; None where there is none.

    Raises:
        ShortVError: the folder cannot be read, or a checkpoint is of another training.
    """
    location = locate(uri)
    try:
        attempts = _folders(location.filesystem, f"{location.path}/{CHECKPOINTS}")
        paths = [path for attempt in attempts for path in _folders(location.filesystem, attempt)]
        found = [checkpoint_at(path, identity, location.filesystem) for path in paths]
    except OSError as error:
        raise ShortVError(f"the checkpoints in {location.shown} cannot be read: {one_line(error)}") from error
    return max(filter(None, found), key=lambda checkpoint: checkpoint.step, default=None)


def new_attempt(uri: str) -> str:
    """Name a new attempt: Ray Train's own bookkeeping of an attempt that was killed may be cut short."""
    location = locate(uri)
    names = _folders(location.filesystem, f"{location.path}/{CHECKPOINTS}")
    return f"attempt-{max((int(name.rpartition('-')[2]) for name in names), default=0) + 1:05d}"


def remove_before(folder: Folder, checkpoint: Checkpoint) -> None:
    """Remove the checkpoints of attempts before the one that wrote this."""
    current = checkpoint.path.split("/")[-2]
    for name in {name.split("/")[1] for name in folder.list(CHECKPOINTS)}:
        if name < current:
            folder.delete(f"{CHECKPOINTS}/{name}")


def _folders(filesystem: pafs.FileSystem, path: str) -> list[str]:
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return [info.path for info in infos if info.type == pafs.FileType.Directory]


def checkpoint_at(path: str, identity: str, filesystem: pafs.FileSystem | None = None) -> Checkpoint | None:
    """Read the record of the checkpoint in a directory; None unless the checkpoint is whole.

    Raises:
        ShortVError: it is of another training.
    """
    filesystem = filesystem or pafs.LocalFileSystem()
    try:
        with filesystem.open_input_stream(f"{path}/{_RECORD}") as stream:
            record = parse_json(bytes(stream.readall()), what=_RECORD, limit_bytes=_RECORD_BYTES)
    except (Refused, FileNotFoundError):  # cut short, not there yet, or removed for a newer one just now
        return None
    if record["identity"] != identity:
        raise ShortVError(f"{path} is a checkpoint of another training; delete it to start anew")
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    sizes = {info.path.removeprefix(f"{path}/"): info.size for info in infos}
    if any(sizes.get(file) != size for file, size in record["files"].items()):
        return None
    return Checkpoint(path=path, step=record["step"], rows=record["rows"], errors=record["errors"])
