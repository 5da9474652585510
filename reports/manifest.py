"""The manifest of a sweep folder: what ran, on what, and how far it got."""

import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from types import MappingProxyType
from typing import Any, Final

from reports.masking import masked
from reports.store import Folder
from shortv.errors import Refused

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_SCHEMA_VERSION: Final = 1

# Distribution names behind the versions that a manifest records.
_DISTRIBUTIONS: Final = ("shortv", "torch", "torchvision", "transformers", "ray", "pyarrow", "lmms-eval")


class State(StrEnum):
    """How far a run got; only COMPLETE and PARTIAL (samples are missing, with reasons) are final."""

    RUNNING = "running"
    COMPLETE = "complete"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a sweep was asked to do and what came of it.

    `arguments` are masked when the manifest is made. `counts` are numbers of samples by state (used, errors, ...)
    or of other things counted; `stability` is the share of bootstrap resamples choosing the same layers, by share
    of samples and mode; `details` holds further facts (device, processor class, ...). Times are ISO 8601 in UTC,
    `wall_seconds` adds up all runs of the command, `attempts` counts them: 1 after the first start of a driver, and a
    finished sweep that is only shown again adds none. `noise_floor` is in nats.
    """

    schema_version: int = MANIFEST_SCHEMA_VERSION
    kind: str = "sweep"
    state: State
    arguments: Mapping[str, Any]
    arguments_digest: str
    versions: Mapping[str, str]
    model: str
    revision: str | None
    config_digest: str
    num_layers: int
    modes: tuple[str, ...]
    kl_direction: str
    calibration_ids: tuple[str, ...]
    calibration_digest: str
    seed: int
    noise_floor: float | None = None
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    stability: Mapping[str, Any] | None = None
    attempts: int = 0
    started: str
    finished: str | None = None
    wall_seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", State(self.state))
        object.__setattr__(self, "arguments", masked(self.arguments))
        object.__setattr__(self, "details", masked(self.details))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object, in the order of the fields."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str = MANIFEST_NAME) -> "Manifest":
        """Rebuild a manifest, strictly.

        Raises:
            Refused: it is of another kind or schema version, or has missing, unknown or malformed fields.
        """
        check_fields(value, kind="sweep", version=MANIFEST_SCHEMA_VERSION, types=_TYPES, shown=shown)
        known: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**known)

    def source(self, samples: int, direction: str) -> dict[str, Any]:
        """Return what a plan made from this sweep says of its origin."""
        sweep = [self.arguments_digest, self.calibration_digest, self.config_digest]
        return {"sweep": digest_of(sweep), "samples": samples, "seed": self.seed, "kl_direction": str(direction)}

    def save(self, folder: Folder) -> None:
        """Write the manifest into its folder, atomically."""
        folder.write_json(MANIFEST_NAME, self.to_json())

    @classmethod
    def load(cls, folder: Folder) -> "Manifest":
        """Read the manifest of a folder. Raises Refused when there is none or it is not a sweep's."""
        return cls.from_json(read_manifest(folder, "sweep"), f"{folder.shown}/{MANIFEST_NAME}")


_TYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "schema_version": int,
        "kind": str,
        "state": str,
        "arguments": dict,
        "arguments_digest": str,
        "versions": dict,
        "model": str,
        "revision": str | None,
        "config_digest": str,
        "num_layers": int,
        "modes": list,
        "kl_direction": str,
        "calibration_ids": list,
        "calibration_digest": str,
        "seed": int,
        "noise_floor": int | float | None,
        "counts": dict,
        "stability": dict | None,
        "attempts": int,
        "started": str,
        "finished": str | None,
        "wall_seconds": int | float | None,
        "details": dict,
    }
)


# The job that writes each kind of result folder.
_JOBS: Final = MappingProxyType(
    {"sweep": "jobs/lc_sweep.py", "campaign": "jobs/campaign.py", "training": "jobs/train.py"}
)


def read_manifest(folder: Folder, kind: str) -> dict[str, Any]:
    """Read the JSON of a folder's manifest. Raises Refused when there is none."""
    if not folder.exists(MANIFEST_NAME):
        raise Refused(f"{folder.shown} holds no {MANIFEST_NAME}; give an output folder of {_JOBS[kind]}")
    return folder.read_json(MANIFEST_NAME)


def check_fields(value: Mapping[str, Any], *, kind: str, version: int, types: Mapping[str, Any], shown: str) -> None:
    """Raise Refused unless `value` is a manifest of that kind and version, with these fields and types alone."""
    found = value.get("kind")
    if found != kind:
        raise Refused(f"{shown} is of kind {found!r}, not {kind!r}; give the output folder of {_JOBS[kind]}")
    if value.get("schema_version") != version:
        raise Refused(
            f"{shown} has schema version {value.get('schema_version')!r}, this release reads {version}; "
            f"read it with the release that wrote it, or run the {kind} in a new folder"
        )
    unknown = sorted(value.keys() - types.keys())
    missing = sorted(types.keys() - value.keys())
    if unknown or missing:
        raise Refused(
            f"{shown} has missing fields {missing} and unknown fields {unknown}; "
            f"it was changed by hand or is not from this release: run the {kind} in a new folder"
        )
    for name, allowed in types.items():
        # Python counts truth values as integers; no field of a manifest is one.
        if not isinstance(value[name], allowed) or isinstance(value[name], bool):
            raise Refused(f"{shown} has a {name} of the wrong type ({value[name]!r}); run the {kind} again")
    if value["state"] not in list(State):
        raise Refused(f"{shown} has the unknown state {value['state']!r}; expected {', '.join(State)}")


def plain(value: Any) -> Any:
    """Return a JSON-like value as dictionaries, lists and exact strings, as a JSON file would give it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def digest_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON-like value, independent of the order of its keys."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def arguments_digest(arguments: Mapping[str, Any], *, ignore: Collection[str] = ()) -> str:
    """Return the digest of masked arguments, less those that cannot change a result (number of workers)."""
    return digest_of(masked({name: item for name, item in arguments.items() if name not in ignore}))


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes results, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def utc_now() -> str:
    """Return the time now as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
