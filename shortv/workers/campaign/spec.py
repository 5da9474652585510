"""The settings of a campaign, from flags and a TOML recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from shortv.spec import Count, Device, Gpus, Limit, LoadingSpec, Seed, Share, Texts, Workers


def _gen_kwargs(value: object) -> object:
    """Read a table, or lmms-eval's `name=value,name=value`."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(name.strip() and equals for name, equals, _ in pairs):
            raise ValueError("give name=value,name=value")
        value = {name.strip(): _literal(text.strip()) for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise ValueError("give a table of names and values")
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("give text, finite numbers, true, false, and lists of them") from None
    return dict(value)


def _literal(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Settings that do not change the results of any cell.
_NOT_DECIDING = {"replicas", "gpus_per_replica", "batch_size", "num_concurrent", "device"}
_NOT_DECIDING |= {"fail_on_error", "retry_failed", "output_path"}


class CampaignSpec(LoadingSpec):
    """One campaign: models, plans and tasks, and how to run them. Every field is a flag and a key of the recipe."""

    models: Annotated[Texts, Field(min_length=1)] = Field(
        description="Hub id, or a folder. May be repeated. [default: the bundled model]",
        json_schema_extra={"also": "--model"},
    )
    plans: Texts = Field(
        (),
        description="Plans, as described above; may be repeated or separated by commas.",
        json_schema_extra={"also": "--plan"},
    )
    tasks: Annotated[Texts, Field(min_length=1)] = Field(
        ("shapes_vqa",),
        description="lmms-eval tasks; may be repeated or separated by commas.",
        json_schema_extra={"also": "--task"},
    )
    include_path: Texts = Field((), description="Folder with your own lmms-eval tasks. The bundled tasks need none.")
    limit: Limit | None = Field(None, description="Samples per task; below 1 a share. [default: all]")
    seed: Seed = Field(0, description="Seed of sampled completions and of the intervals.")
    gen_kwargs: Annotated[Mapping[str, Any], BeforeValidator(_gen_kwargs)] = Field(
        default_factory=dict, description="name=value,name=value; replaces entries of the task's generation_kwargs."
    )
    replicas: Workers | None = Field(
        None,
        description="N or MIN:MAX. [default: one per free GPU, or one on CPUs]",
        json_schema_extra={"metavar": "TEXT"},
    )
    gpus_per_replica: Gpus = Field(1.0, description="GPUs of a replica; above 1 the model is spread over them.")
    batch_size: Count = Field(
        16, description="Maximum number of sequences in a batch of a replica.", json_schema_extra={"short": "-b"}
    )
    num_concurrent: Count | None = Field(
        None, description="Documents on their way to replicas at once. [default: 48 per replica]"
    )
    device: Device = Field("auto", description="Where replicas run.")
    output_path: Annotated[str, Field(min_length=1)] = Field(description="Folder or URI (s3://...) for the results.")
    fail_on_error: Share = Field(0.0, description="Share of the samples of a cell that may fail with exit status 0.")
    retry_failed: bool = Field(
        False, description="Ask documents again that failed, or score them again where only scoring failed."
    )

    def arguments(self) -> dict[str, Any]:
        """Return the settings by name, as JSON values."""
        return self.model_dump(mode="json")


def campaign_submission_id(spec: CampaignSpec) -> str:
    """Return the id for the next attempt of a campaign. Raises Refused when its folder holds something else."""
    from reports.manifest import CampaignManifest, arguments_digest
    from shortv.workers.run import submission_id

    digest = arguments_digest(spec.arguments(), ignore=_NOT_DECIDING)
    return submission_id("campaign", digest, spec.output_path, CampaignManifest)
