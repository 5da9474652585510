"""What a user asked a training to do, and whether the model can have such parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from shortv.errors import Refused, one_line
from shortv.learned.system import System
from shortv.spec import (
    Count,
    Device,
    Limit,
    LoadingSpec,
    ModelSpec,
    Seconds,
    Share,
    Spec,
    Texts,
    Workers,
    read_chat_template,
)

if TYPE_CHECKING:
    from shortv.families import LoadedModel

PartsDtype = Literal["float32", "bfloat16", "float16"]
GENERATED = "generated"


class TrainSpec(LoadingSpec):
    """One training, apart from the system's recipe."""

    model: str = Field(description="Hub id, or a folder with config.json and safetensors. [default: the bundled model]")
    data: tuple[str, ...] = Field(
        (),
        description="FILE.parquet in the calibration format, or an lmms-eval TASK:NUMBER; may be repeated. "
        "[default, for the bundled model: generated samples]",
    )
    samples: Count = Field(4096, description="Samples to generate.")
    kinds: Texts = Field((), description="Kinds of generated question, by commas. [default: those of the system]")
    output_path: str = Field(description="Folder or URI (s3://...) for the results, on storage that all nodes share.")
    limit: Limit | None = Field(None, description="Samples per source; below 1 a share of each file.")
    include_path: str | None = Field(None, description="Folder with your own lmms-eval tasks.")
    checkpoint_every: Count = Field(100, description="Steps between checkpoints.")
    parts_dtype: PartsDtype = Field("float32", description="What the parts are saved in; they train in float32.")
    chat_template: str | None = Field(None, description="Jinja file, for a model without a chat template.")
    workers: Workers | None = Field(None, description="N or MIN:MAX. [default: one per free GPU, or one on CPUs]")
    device: Device = "auto"
    timeout: Seconds = Field(1800.0, description="Seconds without a finished step until the training is given up.")
    fail_on_error: Share = Field(0.0, description="Share of unusable samples that counts as 0.")
    threshold: tuple[Share, ...] = Field(
        (), description="Exit probability; may be repeated, a plan each. [default: 0.5]"
    )

    def base_model(self) -> ModelSpec:
        """Return what loads the model. Raises Refused when the chat template cannot be read."""
        return self.of_model(self.model, read_chat_template(self.chat_template))

    def arguments(self, model: ModelSpec, system: System, recipe: Spec) -> dict[str, Any]:
        """Return the arguments that decide the result, by the name of their option.

        Args:
            model: the model at the commit that was found.
        """
        decisive = {"dtype", "attn_implementation", "trust_remote_code", "chat_template"}
        found = {
            "kind": str(system.kind),
            "model": model.name,
            "revision": model.revision,
            **model.model_dump(include=decisive),
            "data": list(self.data) or GENERATED,
            "limit": self.limit,
            "thresholds": list(self.threshold),
            "parts-dtype": self.parts_dtype,
            **recipe.model_dump(mode="json"),
        }
        return {name.replace("_", "-"): value for name, value in found.items()}


def check_trainable(system: System, model: ModelSpec, recipe: Any, thresholds: tuple[float, ...]) -> None:
    """Set up a training of the model's outline, and name the plans that would come of it.

    Raises:
        Refused: the model cannot have such parts, the recipe does not fit it, or two plans would have one name.
    """
    loaded = outline(model)
    parts = system.trainer(loaded, recipe).parts()
    plans = system.plans(parts.settings, loaded.architecture.num_layers, thresholds)
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise Refused(
                f"{names.count(name)} plans would have the name {name}; give each --threshold once, and thresholds "
                "that differ in six digits"
            )


def outline(spec: ModelSpec) -> LoadedModel:
    """Build a model on torch's meta device, in a fraction of a second: it has shapes and cannot run.

    Raises:
        Refused: no model can be built from the configuration, or its text backbone is not supported.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from shortv.families import wrap

    remote = spec.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(spec.name, revision=spec.revision, trust_remote_code=remote)
        with torch.device("meta"):
            model = cast(Any, AutoModelForImageTextToText).from_config(
                config, attn_implementation=spec.attn_implementation, trust_remote_code=remote
            )
    except Exception as error:  # whatever a configuration makes the model's own code raise
        raise Refused(f"a model cannot be built from the configuration of {spec.name!r}: {one_line(error)}") from error
    return wrap(model, name=spec.name, revision=spec.revision, chat_template=spec.chat_template)
