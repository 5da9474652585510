"""The manifest of a training folder, as far as the list of runs tells of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from reports.manifest import MANIFEST_NAME, State, check_fields

KIND: Final = "training"
_SCHEMA_VERSION: Final = 1
# Floor 3 writes this manifest, and nothing here may import it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingManifest:
    """What was trained and how far it got; `parts` is the kind of learned parts."""

    kind: str = KIND
    state: State
    parts: str
    model: str
    counts: Mapping[str, Any]
    details: Mapping[str, Any]
    started: str
    finished: str | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str = MANIFEST_NAME) -> "TrainingManifest":
        """Read a manifest, strictly.

        Raises:
            Refused: it is of another kind or schema version, or has missing, unknown or malformed fields.
        """
        check_fields(value, kind=KIND, version=_SCHEMA_VERSION, types=_TYPES, shown=shown)
        names = ("parts", "model", "counts", "details", "started", "finished")
        return cls(state=State(value["state"]), **{name: value[name] for name in names})
