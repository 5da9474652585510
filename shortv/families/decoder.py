"""One view of every supported model: its decoder layers, their attention and FFN halves, its final norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from shortv.errors import Refused
from shortv.families.table import FAMILIES, TEXT_BACKBONES, Family, LayerParts, family_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The text decoder of a multimodal model, by references to its modules."""

    family: Family
    config: Any
    parts: LayerParts
    backbone: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module
    visual_ids: frozenset[int]
    text: nn.Module
    """The module that loops over the layers."""

    def attention(self, layer: nn.Module) -> nn.Module:
        """The module whose (first) output is added to the residual stream by the attention half."""
        return cast(nn.Module, getattr(layer, self.parts.attention))

    def ffn(self, layer: nn.Module) -> nn.Module:
        """The module whose output is added to the residual stream by the FFN half."""
        return cast(nn.Module, getattr(layer, self.parts.ffn))

    def ffn_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the FFN: its input is the residual stream between the two halves."""
        return cast(nn.Module, getattr(layer, self.parts.ffn_norm))

    def attention_norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the attention block."""
        return cast(nn.Module, getattr(layer, self.parts.attention_norm))

    def add_attention(self, layer: nn.Module, hidden_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """The residual stream after the attention half, from what entered it and the attention block's output."""
        norm = self.parts.attention_post_norm
        return hidden_BTD + (getattr(layer, norm)(output_BTD) if norm else output_BTD)

    def ffn_half(self, layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """x + FFN(norm(x)), the second half of a layer on its own."""
        output_BTD: Tensor = self.ffn(layer)(self.ffn_norm(layer)(hidden_BTD))
        norm = self.parts.ffn_post_norm
        return hidden_BTD + (getattr(layer, norm)(output_BTD) if norm else output_BTD)

    @property
    def projector(self) -> nn.Module:
        """The module whose output rows become the visual rows.

        Raises:
            Refused: this family has no such module.
        """
        if self.family.projector is None:
            known = ", ".join(family.label for family in FAMILIES.values() if family.projector)
            raise Refused(
                f"layers of {self.family.label} cannot have projectors of their own: {self.family.unprojected}; "
                f"families that can: {known}"
            )
        return self.backbone.get_submodule(self.family.projector)

    @property
    def num_deepstack(self) -> int:
        """Number of first layers after which the model adds vision features to visual rows (Qwen3-VL's DeepStack)."""
        vision = getattr(self.config, "vision_config", None)
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Final norm and LM head over states of the last layer, shape (B, V)."""
        hidden_BD = hidden_BD.to(self.device(self.norm))
        normed_BD: Tensor = self.norm(hidden_BD)
        logits_BV: Tensor = self.head(normed_BD.to(self.device(self.head)))
        return logits_BV

    def device(self, module: nn.Module) -> torch.device:
        """Return the device of a module's weights (a model may be spread over several devices)."""
        return next(module.parameters()).device


def decoder_of(model: nn.Module) -> Decoder:
    """Find the decoder of a transformers model.

    Raises:
        Refused: the model's family or its text backbone is not supported.
    """
    config: Any = model.config
    family = family_of(config.model_type)
    text_type = config.get_text_config().model_type
    if text_type not in TEXT_BACKBONES:
        raise Refused(
            f"the text backbone {text_type!r} of this {family.label} model is not supported; "
            f"supported backbones: {', '.join(TEXT_BACKBONES)}"
        )
    try:
        text, backbone, head = (attrgetter(path)(model) for path in (family.decoder, family.backbone, family.head))
    except AttributeError as error:
        raise Refused(
            f"this {type(model).__name__} has no {family.head} or no {family.decoder}; pass the {family.label} "
            "...ForConditionalGeneration itself, as AutoModelForImageTextToText loads it, without wrappers"
        ) from error
    return Decoder(
        family=family,
        config=config,
        parts=TEXT_BACKBONES[text_type],
        backbone=backbone,
        layers=tuple(text.layers),
        norm=text.norm,
        text=text,
        head=head,
        visual_ids=family.visual_ids(config),
    )
