"""The manifest of a training folder: what ran, on what, and how far it got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from reports.manifest import MANIFEST_NAME, State, check_fields, plain, read_manifest
from reports.masking import masked
from reports.store import Folder

KIND: Final = "training"
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingManifest:
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str = MANIFEST_NAME) -> TrainingManifest:
        """Rebuild a manifest, strictly.

        Raises:
            Refused: it is of another kind or schema version, or has missing, unknown or malformed fields.
        """
        check_fields(value, kind=KIND, version=SCHEMA_VERSION, types=_TYPES, shown=shown)
        return cls(**value)

    def save(self, folder: Folder) -> None:
        """Write the manifest into its folder, atomically."""
        folder.write_json(MANIFEST_NAME, {item.name: plain(getattr(self, item.name)) for item in fields(self)})

    @classmethod
    def load(cls, folder: Folder) -> TrainingManifest:
        """Read the manifest of a folder. Raises Refused when there is none or it is not a training's."""
        return cls.from_json(read_manifest(folder, KIND), f"{folder.shown}/{MANIFEST_NAME}")


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
