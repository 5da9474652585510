"""Learned parts and the plans that name them, as files of a result folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shortv.families import LoadedModel
from shortv.learned.base import Parts
from shortv.learned.files import save_parts
from shortv.learned.system import PlanSpec
from shortv.plan import LearnedParts, Plan

PARTS = "parts"
PLANS = "plans"


def result_files(
    loaded: LoadedModel,
    parts: Parts,
    plans: Sequence[PlanSpec],
    *,
    model: str,
    training: Mapping[str, Any],
    source: Mapping[str, Any],
    dtype: str,
) -> dict[str, bytes]:
    """Give each file's content by its name; the header and the plans come after the weights that they name.

    Args:
        model: the name that header and plans give the base model.
        training: what the header says about how the parts were made.
        source: what the plans say about it.
        dtype: what the weights are saved in.
    """
    architecture = loaded.architecture
    with tempfile.TemporaryDirectory(prefix="shortv-parts-") as place:
        header = save_parts(
            place,
            parts,
            model=model,
            revision=loaded.revision,
            config_digest=architecture.config_digest,
            training=training,
            dtype=getattr(torch, dtype),
        )
        names = sorted((path.name for path in Path(place).iterdir()), key=lambda name: name.endswith(".json"))
        files = {f"{PARTS}/{name}": (Path(place) / name).read_bytes() for name in names}
    for plan in plans:
        made = Plan(
            name=plan.name,
            model=model,
            revision=loaded.revision,
            config_digest=architecture.config_digest,
            num_layers=architecture.num_layers,
            modes=plan.modes,
            source={**source, **parts.costs(architecture)},
            parts=LearnedParts(kind=parts.kind, path=f"../{PARTS}", digest=header.digest, threshold=plan.threshold),
        )
        files[f"{PLANS}/{plan.name}.json"] = made.to_json().encode()
    return files
