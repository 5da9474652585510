"""The manifest of a campaign folder: which models, plans and tasks, and how far the run got."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final

from reports.manifest import MANIFEST_NAME, State, check_fields, plain, read_manifest
from reports.masking import masked
from reports.store import Folder

CAMPAIGN_SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignManifest:
    """What a campaign was asked to do and what came of it; it describes the last recipe that ran in the folder.

    `models` hold name, revision, digest, config_digest and architecture; `plans` the model they are for, name, kind
    (full, plan, random, first, last), digest, modes, learned parts and what their training took; `tasks` name, digest,
    num_docs and main_metric. `counts` are numbers of cells by state and of samples. `attempts` counts the runs that had
    work to do: 1 after the first start of a driver. Times are ISO 8601 in UTC, `wall_seconds` adds up all runs.
    """

    schema_version: int = CAMPAIGN_SCHEMA_VERSION
    kind: str = "campaign"
    state: State
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    models: tuple[Mapping[str, Any], ...]
    plans: tuple[Mapping[str, Any], ...]
    tasks: tuple[Mapping[str, Any], ...]
    seed: int
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    attempts: int = 0
    started: str
    finished: str | None = None
    wall_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", State(self.state))
        object.__setattr__(self, "arguments", masked(self.arguments))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object, in the order of the fields."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], shown: str = MANIFEST_NAME) -> "CampaignManifest":
        """Rebuild a manifest, strictly.

        Raises:
            Refused: it is of another kind or schema version, or has missing, unknown or malformed fields.
        """
        check_fields(value, kind="campaign", version=CAMPAIGN_SCHEMA_VERSION, types=_TYPES, shown=shown)
        known: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**known)

    def save(self, folder: Folder) -> None:
        """Write the manifest into its folder, atomically."""
        folder.write_json(MANIFEST_NAME, self.to_json())

    @classmethod
    def load(cls, folder: Folder) -> "CampaignManifest":
        """Read the manifest of a folder. Raises Refused when there is none or it is not a campaign's."""
        return cls.from_json(read_manifest(folder, "campaign"), f"{folder.shown}/{MANIFEST_NAME}")


_TYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "schema_version": int,
        "kind": str,
        "state": str,
        "arguments": dict,
        "versions": dict,
        "models": list,
        "plans": list,
        "tasks": list,
        "seed": int,
        "counts": dict,
        "attempts": int,
        "started": str,
        "finished": str | None,
        "wall_seconds": int | float | None,
    }
)
