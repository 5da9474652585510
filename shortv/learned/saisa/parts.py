"""SAISA's parts: a projector for each layer, and the language model as trained with them.

A published checkpoint is read into the same parts (`read_published`). Shapes: N visual tokens of all samples, D width.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.learned.base import Parts
from shortv.learned.saisa.recipe import LanguageModel, ProjectorSettings
from shortv.plan import PartsKind

_ATTENTION = ("q_proj.", "k_proj.", "v_proj.", "o_proj.")
# The released projector is a sequence: linear, GELU, linear.
_PUBLISHED_PROJECTOR = {"linear_1": "0", "linear_2": "2"}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class Projectors(Parts):
    """Projectors from the vision features into the input space of single layers (paper, section 3).

    A projector has the base model's own shape and starts as a copy of it: with untrained parts a plan computes what
    freezing visual tokens in the same layers computes.
    """

    kind: ClassVar[PartsKind] = PartsKind.SAISA
    settings: ProjectorSettings

    def __init__(self, decoder: Decoder, settings: ProjectorSettings) -> None:
        super().__init__(settings)
        self.projectors, self.language_model = nn.ModuleDict(), nn.Module()
        # Parts that are loaded are built on the meta device first, where a copy of the language model takes no memory.
        device = torch.get_default_device() if torch.get_default_device().type == "meta" else None
        own = decoder.projector
        for layer in settings.layers:
            self.projectors[str(layer)] = copy.deepcopy(own).to(device, torch.float32)
        for name in _replaced(decoder, settings.language_model):
            owner, last = _owner(decoder, name)
            value = getattr(owner, last).detach().to(device, torch.float32, copy=True)
            _grow(self.language_model, name, nn.Parameter(value))
        self.requires_grad_(True)

    @classmethod
    def build(cls, decoder: Decoder, settings: ProjectorSettings) -> Self:
        """Copy the base model's projector for each layer, and what is replaced of its language model, in float32.

        Raises:
            Refused: a family whose visual rows are not those of a projector, or a layer that the model does not have.
        """
        if settings.layers[-1] >= len(decoder.layers):
            raise Refused(
                f"layer {settings.layers[-1]} has a projector, but the model has {len(decoder.layers)} layers; "
                "choose layers that it has"
            )
        return cls(decoder, settings)

    def place(self, decoder: Decoder) -> None:
        """Move projectors to the base model's projector, and replaced weights to those that they replace."""
        self.projectors.to(next(decoder.projector.parameters()).device)
        for name, weight in list(self.language_model.named_parameters()):
            owner, last = _owner(decoder, name)
            device = getattr(owner, last).device
            if weight.device != device:
                _grow(self.language_model, name, nn.Parameter(weight.detach().to(device)))

    @property
    def projector_weights(self) -> int:
        """How many weights of one projector meet each visual token; biases and norms are left out."""
        projector = self.projectors[str(self.settings.layers[0])]
        return sum(weight.numel() for weight in projector.parameters() if weight.dim() == 2)

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """Return how many weights one projector has."""
        return {"projector_weights": self.projector_weights}

    def project(self, layer: int, features: Tensor) -> Tensor:
        """Return a layer's visual rows (N, D) from the vision features, in the order of the base model's projector."""
        projector = self.projectors[str(layer)]
        like = next(projector.parameters())
        # Under autocast a product takes either type, while the trained weights stay in float32.
        dtype = features.dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
        projected: Tensor = projector(features.to(like.device, dtype))
        return projected.flatten(0, -2)

    def places(self, decoder: Decoder) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Yield for each weight of the parts the module and the name in the model where it stands while they run.

        Tied weights are replaced together.
        """
        tied = _tied(decoder)
        for name, weight in self.language_model.named_parameters():
            yield *_owner(decoder, name), weight
            if tied and name == "embed_tokens.weight":
                yield *_owner(decoder, "head.weight"), weight


def _replaced(decoder: Decoder, choice: LanguageModel) -> Iterator[str]:
    """Yield the names of the replaced weights: `layers.3.self_attn.q_proj.weight`, `norm.weight`, `head.weight`, ..."""
    if choice == "none":
        return
    for index, layer in enumerate(decoder.layers):
        attention = f"{decoder.parts.attention}."
        for name, _ in layer.named_parameters():
            if choice != "attention" or name.removeprefix(attention).startswith(_ATTENTION):
                yield f"layers.{index}.{name}"
    if choice == "all":
        for root in ("embed_tokens", "norm", "head"):
            module = decoder.head if root == "head" else decoder.text.get_submodule(root)
            if not (root == "head" and _tied(decoder)):
                yield from (f"{root}.{name}" for name, _ in module.named_parameters())


def _owner(decoder: Decoder, name: str) -> tuple[nn.Module, str]:
    """Return the module of the model that holds a weight, and the weight's name there."""
    path, _, last = name.rpartition(".")
    return decoder.head if path == "head" else decoder.text.get_submodule(path), last


def _tied(decoder: Decoder) -> bool:
    return getattr(decoder.head, "weight", None) is decoder.text.get_submodule("embed_tokens").weight


def _grow(root: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a weight into a tree of modules under its dotted name."""
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.register_parameter(last, weight)


def read_published(
    path: str | os.PathLike[str], decoder: Decoder, *, language_model: LanguageModel = "all"
) -> Projectors:
    """Read a published SAISA checkpoint as parts of a LLaVA-1.5 model.

    Names are those of the released class (`llava_llama`): projectors `model.layers.N.mm_projector.{0,2}` of all layers
    and the language model trained with them. Its projector before the first layer is not read, because its output is
    overwritten. Where the model's vocabulary was extended, the model's own rows follow the checkpoint's.

    Args:
        path: a safetensors file, or a folder with such files.
        language_model: what is read of the language model; the rest stays the base model's.

    Raises:
        Refused: the model is not a LLaVA-1.5 with a GELU projector, the path cannot be read, or a tensor is missing or
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
    """Return the name of one of the parts' weights in the published layout."""
    name = name.removeprefix("language_model.")
    found = re.fullmatch(r"projectors\.(\d+)\.(\w+)\.(\w+)", name)
    if found:
        layer, linear, kind = found.groups()
        return f"model.layers.{layer}.mm_projector.{_PUBLISHED_PROJECTOR[linear]}.{kind}"
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def _open(path: Path, files: ExitStack) -> dict[str, Any]:
    """Return for each tensor's name the open file that has it."""
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
