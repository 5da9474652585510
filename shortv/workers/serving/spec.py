"""The settings of an endpoint: flags of jobs/serve.py, arguments of `serve run` and of a Serve config file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from shortv.spec import (
    Count,
    Device,
    Gpus,
    LoadingSpec,
    ModelSpec,
    Seconds,
    Texts,
    Workers,
    read_chat_template,
    validate,
)

BUNDLED_NAME = "shortv-tiny"
"""The name under which the bundled model is served unless another one is given."""
Megas = Annotated[float, Field(gt=0, le=10**6)]


class EndpointSpec(LoadingSpec):
    """An endpoint for one model and its plans. Times are in seconds."""

    model: str = Field(
        "", description="Hub id, or a folder with config.json and safetensors. [default: the bundled model]"
    )
    served_model_name: str | None = Field(
        None, description="Name that clients use. [default: the hub id, or the folder's name]"
    )
    plans: Texts = Field(
        (),
        description="Plan file, folder with shortv_plan.json or published name; repeatable.",
        json_schema_extra={"flag": "--plan"},
    )
    chat_template: str | None = Field(None, description="Jinja file, for a model without a chat template.")
    device: Device = "auto"
    replicas: Workers = Field(
        "1",
        validate_default=True,
        description="A number, or MIN:MAX to follow the load.",
        json_schema_extra={"metavar": "N|MIN:MAX"},
    )
    gpus_per_replica: Gpus = Field(1.0, description="Above 1 spreads the model over them.")
    cpus_per_replica: float | None = Field(
        None, ge=0, le=10**6, description="[default: one beside a GPU, else an even share of the nodes' CPUs]"
    )
    batch_size: Count = Field(
        16, description="Requests that run together in each replica.", json_schema_extra={"short": "-b"}
    )
    max_queued: Count = Field(64, description="Requests that may wait in each replica.")
    timeout: Seconds = Field(120.0, description="Seconds after which a request is cancelled.")
    startup_timeout: Seconds = Field(1800.0, description="Seconds within which the replicas must have started.")
    stall_timeout: Seconds = Field(
        600.0, description="Seconds without a finished decoder layer or step after which a busy replica is replaced."
    )
    max_body_mb: Megas = Field(20.0, description="Largest request body, in MiB.")
    max_images: Count = Field(16, description="Most images of a request.")
    max_image_megapixels: Megas = Field(64.0, description="Most megapixels of all images of a request together.")
    api_key_file: str | None = Field(None, description="File with one accepted API key per line.")
    reports: str | None = Field(
        None, description="Folder or URI above sweeps and campaigns, whose pages and tables are served at /reports/."
    )

    @property
    def model_path(self) -> str:
        """The given model, or the folder of the bundled one."""
        return self.model or str(Path(__file__).resolve().parents[2] / "tiny" / "model")

    @property
    def served_name(self) -> str:
        """The name that clients use; a folder is served under its last name."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return BUNDLED_NAME
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @property
    def max_in_flight(self) -> int:
        """As many requests as all replicas accept; more are refused by the endpoint, which costs less."""
        return self.replicas.high * (self.batch_size + self.max_queued)

    def model_spec(self) -> ModelSpec:
        """Return what a replica needs to load the model. Raises Refused for an unreadable chat template."""
        return self.of_model(self.model_path, read_chat_template(self.chat_template))


def read_arguments(arguments: Mapping[str, Any]) -> EndpointSpec:
    """Read the arguments of `serve run module:app key=value` or of a Serve config file; both spellings are accepted.

    Raises:
        Refused: an argument is unknown or out of its range.
    """
    return validate(EndpointSpec, {name.replace("-", "_"): value for name, value in arguments.items()})
