"""The manifest of a training folder: what ran, on what, and how far it got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from reports.manifest import MANIFEST_NAME, State, check_fields, plain, read_manifest
from reports.masking import masked
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.workers.driver_lock import LOCK_NAME
from shortv.workers.request import shown

KIND: Final = "training"
SCHEMA_VERSION: Final = 1
# Decides nothing: the digest of the samples stands for them, wherever they were read from.
NOT_DECIDING = ("data",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """What a training was asked to do and what came of it; fields as in a sweep's manifest.

    `parts` is the kind of learned parts, `data_digest` covers all samples in order; `counts` are steps, samples and
    unusable samples (`errors`).
    """

    schema_version: int = SCHEMA_VERSION
    kind: str = KIND
    parts: str
    state: State
    arguments: Mapping[str, Any]
    arguments_digest: str
    versions: Mapping[str, str]
    model: str
    revision: str | None
    config_digest: str
    num_layers: int
    data_digest: str
    counts: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 0
    started: str
    finished: str | None = None
    wall_seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", State(self.state))
        object.__setattr__(self, "arguments", masked(self.arguments))

    def save(self, folder: Folder) -> None:
        """Write the manifest into its folder, atomically."""
        folder.write_json(MANIFEST_NAME, {item.name: plain(getattr(self, item.name)) for item in fields(self)})

    @classmethod
    def load(cls, folder: Folder) -> TrainingRecord:
        """Read the manifest of a folder. Raises Refused when there is none or it is not a training's."""
        value = read_manifest(folder, KIND)
        check_fields(value, kind=KIND, version=SCHEMA_VERSION, types=_TYPES, shown=f"{folder.shown}/{MANIFEST_NAME}")
        return cls(**value)


_TYPES: Final[Mapping[str, Any]] = {
    "schema_version": int,
    "kind": str,
    "parts": str,
    "state": str,
    "arguments": dict,
    "arguments_digest": str,
    "versions": dict,
    "model": str,
    "revision": str | None,
    "config_digest": str,
    "num_layers": int,
    "data_digest": str,
    "counts": dict,
    "attempts": int,
    "started": str,
    "finished": str | None,
    "wall_seconds": int | float | None,
    "details": dict,
}


def open_training(folder: Folder, wanted: TrainingRecord) -> TrainingRecord | None:
    """Return the manifest of an earlier run of the same training, or None for a new folder.

    Raises:
        Refused: the folder holds another training, with what differs, or something else; or it cannot be written.
    """
    try:
        names = [name for name in folder.list() if name != LOCK_NAME]
        found = TrainingRecord.load(folder) if MANIFEST_NAME in names else None
    except Refused:
        raise
    except ShortVError as error:
        raise Refused(f"{error}; choose another --output-path") from error
    if found is not None:
        _check_same(folder, found, wanted)
    elif names:
        raise Refused(
            f"{folder.shown} holds {len(names)} files ({names[0]}) and no training; choose a new or empty --output-path"
        )
    if found is None or found.state is State.RUNNING:
        folder.check_writable()
    return found


def _check_same(folder: Folder, found: TrainingRecord, wanted: TrainingRecord) -> None:
    if found.arguments_digest == wanted.arguments_digest:
        return
    names = [
        name
        for name in {**wanted.arguments, **found.arguments}
        if name not in NOT_DECIDING and found.arguments.get(name) != wanted.arguments.get(name)
    ]
    pairs = (
        f"{name} {shown(found.arguments.get(name))} there, {shown(wanted.arguments.get(name))} here" for name in names
    )
    raise Refused(
        f"{folder.shown} holds another training ({'; '.join(pairs) or 'of another release'}); "
        "choose another --output-path, or repeat its arguments"
    )
