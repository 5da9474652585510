"""What a user asks of a sweep."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from shortv.errors import Refused
from shortv.plan import Mode, parse_mode
from shortv.records import KlDirection
from shortv.spec import Count, Device, Gpus, Limit, LoadingSpec, ModelSpec, Seed, Share, Workers

ABLATIONS = tuple(mode for mode in Mode if mode is not Mode.FULL)
_PLACES = {"output_path", "include_path"}
_WORKERS = {"workers", "gpus_per_worker", "device", "layers_per_unit", "stack", "fail_on_error"}


def _modes(value: object) -> object:
    """Read modes, or text such as `freeze-visual,freeze-text` or `all`; the result is in the canonical order."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError("give modes, or all")
    names = [name.strip() for text in texts for name in str(text).split(",") if name.strip()]
    try:
        found = {mode for name in names for mode in (ABLATIONS if name == "all" else (parse_mode(name),))}
    except Refused as error:
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"give some of {', '.join(ABLATIONS)}, or all")
    if Mode.FULL in found:
        raise ValueError("the mode full changes nothing; give the modes to measure")
    return tuple(mode for mode in ABLATIONS if mode in found)


class SweepSpec(LoadingSpec):
    """One sweep: model, samples, what to ablate, and how to run it. Every field is a flag."""

    model: Annotated[str, Field(min_length=1)] = Field(
        description="Hub id, or a folder with config.json and safetensors. [default: the bundled model]"
    )
    calibration: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="FILE.parquet or an lmms-eval TASK:NUMBER; may be repeated. "
        "[default, for the bundled model: its samples]"
    )
    output_path: Annotated[str, Field(min_length=1)] = Field(description="Folder or URI (s3://...) for the results.")
    limit: Limit | None = Field(
        default=None, description="Samples per calibration source; below 1 a share of each file."
    )
    include_path: str | None = Field(default=None, description="Folder with your own lmms-eval tasks.")
    modes: Annotated[tuple[Mode, ...], BeforeValidator(_modes)] = Field(
        default=(Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT),
        description="Modes to measure, or all.",
        json_schema_extra={"metavar": "TEXT"},
    )
    kl_direction: KlDirection = Field(
        default=KlDirection.FULL_ABLATED,
        description="The direction that ranks; both are stored.",
        json_schema_extra={"metavar": "|".join(KlDirection)},
    )
    batch_size: Count = Field(default=8, description="Samples per batch.", json_schema_extra={"short": "-b"})
    seed: Seed = Field(default=0, description="Seed of task samples and bootstrap resamples.")
    chat_template: str | None = Field(default=None, description="Jinja file, for a model without a chat template.")
    workers: Workers | None = Field(
        default=None,
        description="N or MIN:MAX. [default: one per free GPU, or one on CPUs]",
        json_schema_extra={"metavar": "TEXT"},
    )
    gpus_per_worker: Gpus = Field(default=1.0, description="GPUs of a worker; above 1 the model is spread over them.")
    device: Device = Field(default="auto", description="Where workers run.")
    layers_per_unit: Count | None = Field(
        default=None, description="Layers that a worker ablates per unit. [default: by cost]"
    )
    stack: Count | None = Field(default=None, description="Ablations run together. [default: as many as fit]")
    fail_on_error: Share = Field(default=0.0, description="Share of samples whose failure still gives exit status 0.")

    def model_spec(self) -> ModelSpec:
        """Return what a worker needs to load the model. `chat_template` holds the text of the file by now."""
        return self.of_model(self.model, self.chat_template)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that decide the result, by the name of their option."""
        deciding = self.model_dump(mode="json", exclude=_PLACES | _WORKERS)
        return {name.replace("_", "-"): value for name, value in deciding.items()}


def sweep_submission_id(spec: SweepSpec) -> str:
    """Return the id for the next attempt of a sweep. Raises Refused when its folder holds something else."""
    from reports.manifest import SweepManifest, arguments_digest
    from shortv.workers.run import submission_id

    return submission_id("lc", arguments_digest(spec.arguments()), spec.output_path, SweepManifest)
