"""Manifests of result folders: what ran, on what, and how far it got. One model per kind of run, one base for all.

A manifest is written by the driver of a run and read by everything that shows or continues it. Reading is strict:
unknown fields, values of another type and numbers out of range are refused in one line.
"""

import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from reports.locations import masked
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import Mode
from shortv.records import KlDirection
from shortv.terminal import printable

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_SCHEMA_VERSION: Final = 1

# Distribution names behind the versions that a manifest records.
_DISTRIBUTIONS: Final = ("shortv", "torch", "torchvision", "transformers", "ray", "pyarrow", "lmms-eval")

Count = Annotated[StrictInt, Field(ge=0, le=2**53)]
Layers = Annotated[StrictInt, Field(ge=1, le=100_000)]
"""Decoder layers of a model. The bound keeps a damaged file from sizing anything that is built per layer."""
Seconds = NonNegativeFloat | None
Share = Annotated[StrictStr, Field(pattern=r"^(0|0?\.\d+|1(\.0+)?)$")]
"""A share as text, such as `0.5`: keys of JSON objects are texts."""
Masked = Annotated[dict[str, Any], AfterValidator(masked)]
"""A JSON object whose secrets are replaced by `***`."""


class State(StrEnum):
    """How far a run got; only COMPLETE and PARTIAL (samples are missing, with reasons) are final."""

    RUNNING = "running"
    COMPLETE = "complete"
    PARTIAL = "partial"


class RunManifest(BaseModel):
    """What every run records.

    `counts` are numbers of samples by state (used, errors, ...) or of other things counted. Times are ISO 8601 in UTC.
    `attempts` counts the starts of a driver that had work to do, `wall_seconds` adds up their durations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    KIND: ClassVar[str]
    JOB: ClassVar[str]
    """The job that writes such runs."""

    schema_version: StrictInt = MANIFEST_SCHEMA_VERSION
    kind: StrictStr
    state: State
    arguments: Masked
    versions: dict[str, StrictStr]
    counts: dict[str, Count] = {}
    attempts: Count = 0
    started: StrictStr
    finished: StrictStr | None = None
    wall_seconds: Seconds = None

    def updated(self, **changes: Any) -> Self:
        """Return the manifest with some fields replaced, validated again."""
        return type(self).model_validate({**dict(self), **changes})

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str = MANIFEST_NAME) -> Self:
        """Rebuild a manifest, strictly.

        Raises:
            Refused: it is of another kind or schema version, or has missing, unknown or malformed fields.
        """
        kind, version = (value.get(name) for name in ("kind", "schema_version"))
        if kind != cls.KIND:
            found = printable(repr(kind), limit=80)
            raise Refused(f"{shown} is of kind {found}, not {cls.KIND!r}; give the output folder of {cls.JOB}")
        again = f"run the {cls.KIND} in a new folder"
        if version != MANIFEST_SCHEMA_VERSION or isinstance(version, bool):
            raise Refused(
                f"{shown} has schema version {printable(repr(version), limit=80)}, this release reads "
                f"{MANIFEST_SCHEMA_VERSION}; read it with the release that wrote it, or {again}"
            )
        # Fields with defaults are optional when a manifest is built, and required in a file.
        missing = sorted(cls.model_fields.keys() - value.keys())
        if missing:
            raise Refused(f"{shown} lacks the fields {', '.join(missing)}; {again}")
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = printable(".".join(map(str, first["loc"])), limit=80)
            problem = f"{printable(repr(first['input']), limit=80)}: {printable(first['msg'], limit=200)}"
            raise Refused(
                f"{shown} has {where} {problem}; it was changed by hand or is from another release: {again}"
            ) from error

    def save(self, folder: Folder) -> None:
        """Write the manifest into its folder, atomically."""
        folder.write_json(MANIFEST_NAME, self.to_json())

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read the manifest of a folder. Raises Refused when there is none or it is of another kind of run."""
        if not folder.exists(MANIFEST_NAME):
            raise Refused(f"{folder.shown} does not contain {MANIFEST_NAME}; give an output folder of {cls.JOB}")
        return cls.from_json(folder.read_json(MANIFEST_NAME), f"{folder.shown}/{MANIFEST_NAME}")


class ModelRunManifest(RunManifest):
    """What a run on one model records. A run continues where the digest of its arguments is the same."""

    arguments_digest: StrictStr
    model: StrictStr
    revision: StrictStr | None
    config_digest: StrictStr
    num_layers: Layers
    details: Masked = {}


class SweepManifest(ModelRunManifest):
    """What a sweep was asked to do and what came of it.

    `stability` is the share of bootstrap resamples that choose the same layers, by mode and share of samples;
    `details` holds further facts (device, processor class, ...). `noise_floor` is in nats.
    """

    KIND: ClassVar[str] = "sweep"
    JOB: ClassVar[str] = "jobs/lc_sweep.py"
    kind: StrictStr = KIND
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)]
    kl_direction: KlDirection
    calibration_ids: tuple[StrictStr, ...]
    calibration_digest: StrictStr
    seed: StrictInt
    noise_floor: NonNegativeFloat | None = None
    stability: dict[str, dict[Share, StrictFloat]] | None = None

    def source(self, samples: int, direction: str) -> dict[str, Any]:
        """Return what a plan made from this sweep says of its origin."""
        sweep = [self.arguments_digest, self.calibration_digest, self.config_digest]
        return {"sweep": digest_of(sweep), "samples": samples, "seed": self.seed, "kl_direction": str(direction)}


class TrainingManifest(ModelRunManifest):
    """What a training was asked to do and what came of it.

    `parts` is the kind of learned parts, `data_digest` covers all samples in order; `counts` are steps, samples and
    unusable samples (`errors`).
    """

    KIND: ClassVar[str] = "training"
    JOB: ClassVar[str] = "jobs/train.py"
    kind: StrictStr = KIND
    parts: StrictStr
    data_digest: StrictStr


class CampaignManifest(RunManifest):
    """What a campaign was asked to do and what came of it; it describes the last recipe that ran in the folder.

    `counts` are numbers of cells by state and of samples.
    """

    KIND: ClassVar[str] = "campaign"
    JOB: ClassVar[str] = "jobs/campaign.py"
    kind: StrictStr = KIND
    models: tuple[dict[str, Any], ...]
    plans: tuple[dict[str, Any], ...]
    tasks: tuple[dict[str, Any], ...]
    seed: StrictInt

    @field_validator("models", "plans", "tasks")
    @classmethod
    def _check_entries(cls, entries: tuple[dict[str, Any], ...], info: ValidationInfo) -> tuple[dict[str, Any], ...]:
        for entry in entries:
            names = ("name", "model") if info.field_name == "plans" else ("name",)
            wrong = [name for name in names if not isinstance(entry.get(name), str)]
            modes = entry.get("modes") if info.field_name == "plans" else []
            if not isinstance(modes, list | tuple) or not all(mode in list(Mode) for mode in modes):
                wrong.append("modes")
            if wrong:
                raise ValueError(f"{', '.join(wrong)} of an entry are missing or malformed")
        return entries


def plain(value: Any) -> Any:
    """Return a JSON-like value as a JSON file would give it back."""
    return json.loads(json.dumps(value, default=dict))


def digest_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON-like value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=dict)
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
