"""A model without its weights: what tells on the driver whether parts can be trained for it."""

from __future__ import annotations

from typing import Any, cast

import torch

from shortv.errors import Refused, one_line
from shortv.families import LoadedModel, wrap
from shortv.learned.system import System
from shortv.learned.training import alone
from shortv.spec import ModelSpec
from shortv.workers.training.request import TrainRequest


def check_trainable(system: System, request: TrainRequest) -> None:
    """Set up a training of the model's outline, and name the plans that would come of it.

    Raises:
        Refused: the model cannot have such parts, the recipe does not fit it, or two plans would have one name.
    """
    loaded = outline(request.model)
    parts = system.trainer(loaded, request.recipe, alone).parts()
    plans = system.plans(parts.settings, loaded.architecture.num_layers, request.thresholds)
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise Refused(
                f"{names.count(name)} plans would have the name {name}; give each --threshold once, and thresholds "
                "that differ in six digits"
            )


def outline(spec: ModelSpec) -> LoadedModel:
    """Build a model of a checked spec on torch's meta device, in a fraction of a second: it has shapes and cannot run.

    Raises:
        Refused: a configuration that no model can be built from, or a text backbone that is not supported.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

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
