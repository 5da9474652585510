"""SAISA's parts: a projector for each layer, and the language model as trained with them (arXiv 2502.02458).

Shapes: N visual tokens of all samples, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.families.parts.base import Parts
from shortv.plan import Mode, PartsKind, modes_of_layers

LanguageModel = Literal["none", "attention", "layers", "all"]
_ATTENTION = ("q_proj.", "k_proj.", "v_proj.", "o_proj.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSettings:
    """Which layers have a projector, and how much of the language model was trained with them.

    `language_model` says which weights the parts hold in place of the base model's: none, those of the four attention
    projections of every layer, those of every layer, or all (layers, embeddings, final norm and head, as the paper's
    second stage trains them).
    """

    layers: tuple[int, ...]
    language_model: LanguageModel = "none"

    def __post_init__(self) -> None:
        numbers = all(type(layer) is int and layer >= 0 for layer in self.layers)
        if not self.layers or not numbers or list(self.layers) != sorted(set(self.layers)):
            raise Refused(f"layers with projectors are {list(self.layers)!r}; list each once, in order, counted from 0")
        if self.language_model not in get_args(LanguageModel):
            raise Refused(
                f"parts cannot hold {self.language_model!r} of a language model; "
                f"choose one of {', '.join(get_args(LanguageModel))}"
            )

    def modes(self, num_layers: int) -> tuple[Mode, ...]:
        """The only modes under which these parts run: a layer with a projector freezes, the others are full."""
        return modes_of_layers(Mode.FREEZE_VISUAL, self.layers, num_layers)


class Place(NamedTuple):
    """Where a weight of the parts stands in the model while they are applied."""

    owner: nn.Module
    name: str
    weight: nn.Parameter


class Projectors(Parts):
    """Projectors from the vision features into the input space of single layers (`reference/saisa.md`, section 2).

    A projector has the base model's own shape and starts as a copy of it: untrained, a plan with these parts is the
    plan that freezes visual tokens in the same layers.
    """

    kind: ClassVar[PartsKind] = PartsKind.SAISA
    needs_tower: ClassVar[bool] = True
    settings: ProjectorSettings

    def __init__(self, decoder: Decoder, settings: ProjectorSettings) -> None:
        super().__init__()
        self.settings = settings
        own = decoder.projector
        self.projectors = nn.ModuleDict({str(layer): copy.deepcopy(own).float() for layer in settings.layers})
        self.language_model = nn.Module()
        for name in _replaced(decoder, settings.language_model):
            owner, last = _owner(decoder, name)
            value = getattr(owner, last).detach().to(torch.float32, copy=True)
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

    @classmethod
    def parse_settings(cls, content: dict[str, Any]) -> ProjectorSettings:
        """Read settings from the JSON beside the weights. Raises Refused."""
        known = {field.name for field in fields(ProjectorSettings)}
        if set(content) != known or not isinstance(content["layers"], list | tuple):
            raise Refused(f"the parts' settings are {content!r}, expected {', '.join(sorted(known))}; train them again")
        return ProjectorSettings(layers=tuple(content["layers"]), language_model=content["language_model"])

    @property
    def projector_weights(self) -> int:
        """Weights that one projector multiplies each visual token with; biases and norms are left out."""
        projector = self.projectors[str(self.settings.layers[0])]
        return sum(weight.numel() for weight in projector.parameters() if weight.dim() == 2)

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """The weights of one projector."""
        return {"projector_weights": self.projector_weights}

    def project(self, layer: int, features: Tensor) -> Tensor:
        """The visual rows (N, D) of a layer, from what the base model's own projector is given, in that one's order."""
        projector = self.projectors[str(layer)]
        like = next(projector.parameters())
        # Under autocast a product takes either type, and the trained weights stay in float32.
        dtype = features.dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
        projected: Tensor = projector(features.to(like.device, dtype))
        return projected.flatten(0, -2)

    def places(self, decoder: Decoder) -> Iterator[Place]:
        """Which weights of the model give way to which of the parts; tied ones give way together."""
        tied = _tied(decoder)
        for name, weight in self.language_model.named_parameters():
            yield Place(*_owner(decoder, name), weight)
            if tied and name == "embed_tokens.weight":
                yield Place(*_owner(decoder, "head.weight"), weight)


def _replaced(decoder: Decoder, choice: LanguageModel) -> Iterator[str]:
    """Names of the replaced weights: `layers.3.self_attn.q_proj.weight`, `norm.weight`, `head.weight`, ..."""
    if choice == "none":
        return
    for index, layer in enumerate(decoder.layers):
        attention = f"{decoder.parts.attention}."
        for name, _ in layer.named_parameters():
            if choice != "attention" or name.removeprefix(attention).startswith(_ATTENTION):
                yield f"layers.{index}.{name}"
    if choice == "all":
        for root, module in _roots(decoder).items():
            if not (root == "head" and _tied(decoder)):
                yield from (f"{root}.{name}" for name, _ in module.named_parameters())


def _roots(decoder: Decoder) -> dict[str, nn.Module]:
    return {"embed_tokens": decoder.text.get_submodule("embed_tokens"), "norm": decoder.norm, "head": decoder.head}


def _owner(decoder: Decoder, name: str) -> tuple[nn.Module, str]:
    """The module of the model that has the weight of that name, and its name there."""
    root, _, rest = name.partition(".")
    if root == "layers":
        number, _, rest = rest.partition(".")
        module = decoder.layers[int(number)]
    else:
        module = _roots(decoder)[root]
    path, _, last = rest.rpartition(".")
    return module.get_submodule(path), last


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
