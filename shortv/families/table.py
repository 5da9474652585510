"""The supported model families, one row each: everything the project knows about their internals.

To add a family:
1. Add its row to `FAMILIES` under the `model_type` of its config. The paths lead to the text decoder (the module with
   `layers` and `norm`), the backbone and the head; the visual ids are the placeholders in the prompt that vision
   features replace; `pixels` is the layout of `pixel_values`, which `vision.LAYOUTS` reads.
2. If its text decoder is of a new type, add that type to `TEXT_BACKBONES`. Its layers must be pre-norm
   (x + attention(norm(x)), then x + ffn(norm(x))), each with its own K and V, and its attention must take a mask.
3. Add a random model to `tests/models.py` (`KINDS`) and a checkpoint with the family's processor to
   `tests/processors.py` (`CHECKPOINTS`). The tests of layers, sweeps, preprocessing, vision features and generation
   then cover it: fast equals reference equals masked, padded equals single, cached vision features equal the tower's.
A family whose tokens are read in another way (cross-attention, recurrent layers) goes into `REFUSED` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from shortv.errors import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """Attribute names inside one pre-norm decoder layer, by default those of Llama."""

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    ffn_norm: str = "post_attention_layernorm"
    ffn: str = "mlp"
    attention_post_norm: str | None = None
    """Norm of the attention output before it is added, where a family has one."""
    ffn_post_norm: str | None = None
    """Norm of the FFN output before it is added, where a family has one."""


_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
TEXT_BACKBONES: dict[str, LayerParts] = {
    **dict.fromkeys(_LIKE_LLAMA, LayerParts()),
    "gemma3_text": LayerParts(
        ffn_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
    ),
}
"""Supported types of text decoders, and where the parts of their layers are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a transformers model of one `model_type` has the parts that the sweep and the executors need."""

    label: str
    """Common name of the family."""
    decoder: str
    """Dotted path from the model to the text decoder that owns `layers` and `norm`."""
    backbone: str
    """Dotted path to the module that runs vision tower and decoder up to the final norm."""
    head: str
    """Dotted path to the LM head."""
    visual_id_fields: tuple[str, ...]
    """Config fields with the ids of the placeholders that vision features replace."""
    positions_from_mask: bool
    """Whether positions count the tokens of the attention mask; otherwise the model computes its own."""
    pixels: Literal["rows", "tiles", "grid", "nested"]
    """Layout of a batch's images in `pixel_values`, a key of `vision.LAYOUTS`."""
    projector: str | None
    """Dotted path, from `backbone`, to the module whose output rows become the visual rows, one for one."""
    unprojected: str = ""
    """Why there is no such module."""
    reorders: str | None = None
    """Dotted path, from `backbone`, to the module around the projector that reorders its rows."""

    def visual_ids(self, config: Any) -> frozenset[int]:
        """Ids of the placeholder tokens that vision features replace, from a model's config."""
        return frozenset(int(getattr(config, name)) for name in self.visual_id_fields)


_LLAVA = Family(
    label="LLaVA-1.5",
    decoder="model.language_model",
    backbone="model",
    head="lm_head",
    visual_id_fields=("image_token_id",),
    positions_from_mask=True,
    pixels="rows",
    projector="multi_modal_projector",
)
_LLAVA_NEXT = replace(
    _LLAVA,
    label="LLaVA-NeXT",
    pixels="tiles",
    projector=None,
    unprojected="projected rows are cut to the image's shape with newline embeddings between them",
)
_QWEN = replace(
    _LLAVA,
    label="Qwen2-VL",
    visual_id_fields=("image_token_id", "video_token_id"),
    positions_from_mask=False,
    pixels="grid",
    projector="visual.merger",
)
_IDEFICS = replace(_LLAVA, label="Idefics3", decoder="model.text_model", pixels="nested", projector="connector")

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": replace(
        _LLAVA_NEXT, label="LLaVA-OneVision", visual_id_fields=("image_token_id", "video_token_id")
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": replace(_QWEN, label="Qwen2.5-VL", reorders="visual"),
    "qwen3_vl": replace(
        _QWEN,
        label="Qwen3-VL",
        projector=None,
        unprojected="further vision features are added to visual rows between its first layers (DeepStack)",
    ),
    "internvl": replace(_LLAVA, label="InternVL3"),
    "idefics3": _IDEFICS,
    "smolvlm": replace(_IDEFICS, label="SmolVLM"),
    "gemma3": replace(_LLAVA, label="Gemma 3"),
}
"""transformers `model_type` to family."""

_DELTA = "its gated-delta layers mix tokens without K and V, so a frozen token cannot be read"
_SHARED = "its layers take inputs of their own and share K and V, so a layer cannot be ablated alone"
REFUSED: dict[str, str] = {
    "mllama": "its text reads the image through cross-attention layers, so there are no visual tokens to freeze",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _DELTA),
    **dict.fromkeys(("gemma3n", "gemma4"), _SHARED),
}
"""Families that cannot be supported, with the reason."""


def family_of(model_type: str) -> Family:
    """Return the family of a transformers `model_type`. Raises Refused for one that is not supported."""
    if model_type in REFUSED:
        raise Refused(f"model type {model_type!r} cannot be supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.label} ({name})" for name, family in FAMILIES.items())
        raise Refused(f"model type {model_type!r} is not supported; supported families: {known}")
    return FAMILIES[model_type]
