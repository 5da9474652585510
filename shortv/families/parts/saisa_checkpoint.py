"""The published SAISA checkpoints as parts of a LLaVA-1.5 model (`reference/saisa.md`, section 5)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.families.parts.saisa import LanguageModel, Projectors, ProjectorSettings

# The released projector is a sequence: linear, GELU, linear.
_PROJECTOR = {"linear_1": "0", "linear_2": "2"}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def read_published(
    path: str | os.PathLike[str], decoder: Decoder, *, language_model: LanguageModel = "all"
) -> Projectors:
    """Read projectors `model.layers.N.mm_projector.{0,2}` of all layers, and the language model trained with them.

    Names are those of the released class (`llava_llama`). Its projector before the first layer is not read: what that
    one makes is overwritten. Where the model's vocabulary was extended, its own rows stand behind the checkpoint's.

    Args:
        path: a safetensors file, or a folder with such files.
        language_model: what is read of the language model; the rest stays the base model's.

    Raises:
        Refused: the model is no LLaVA-1.5 with a GELU projector, nothing there can be read, or a tensor is missing or
            has another shape; the message names it.
    """
    if decoder.config.model_type != "llava" or decoder.config.projector_hidden_act != "gelu":
        raise Refused(
            f"published SAISA checkpoints belong to LLaVA-1.5 models with a GELU projector, and this model is "
            f"{decoder.family.label}; load the LLaVA-1.5 model of the checkpoint's language model"
        )
    layers = tuple(range(len(decoder.layers)))
    parts = Projectors.build(decoder, ProjectorSettings(layers=layers, language_model=language_model))
    with ExitStack() as files, torch.no_grad():
        stored = _open(Path(path), files)
        for name, weight in parts.named_parameters():
            _copy(weight, _published(name), stored, path)
    return parts


def _published(name: str) -> str:
    """The name of one of the parts' weights in the published layout."""
    name = name.removeprefix("language_model.")
    found = re.fullmatch(r"projectors\.(\d+)\.(\w+)\.(\w+)", name)
    if found:
        layer, linear, kind = found.groups()
        return f"model.layers.{layer}.mm_projector.{_PROJECTOR[linear]}.{kind}"
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def _open(path: Path, files: ExitStack) -> dict[str, Any]:
    """Every tensor's name, to the open file that has it."""
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stored: dict[str, Any] = {}
    try:
        for file in found:
            opened = files.enter_context(safe_open(file, framework="pt"))
            stored |= dict.fromkeys(opened.keys(), opened)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{file} cannot be read as safetensors: {error}; download the checkpoint again") from error
    if not stored:
        raise Refused(f"{path} has no safetensors files; give a folder with them (pickled weights are not read)")
    return stored


def _copy(weight: Tensor, name: str, stored: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    if name not in stored:
        raise Refused(f"the checkpoint {path} has no {name}, which a model of this depth needs; give another")
    value: Tensor = stored[name].get_tensor(name)
    rows = len(value) if name in _VOCABULARY else len(weight)
    if rows > len(weight) or value.shape != weight[:rows].shape:
        raise Refused(
            f"{name} of the checkpoint {path} has shape {tuple(value.shape)}, this model needs {tuple(weight.shape)}; "
            "load the LLaVA-1.5 model of the checkpoint's language model"
        )
    weight[:rows].copy_(value)
