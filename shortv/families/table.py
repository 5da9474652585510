"""The supported model families, one row each: everything the project knows about their internals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """Attribute names inside one pre-norm decoder layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    attention_norm: str
    attention: str
    ffn_norm: str
    ffn: str
    attention_post_norm: str | None = None
    """Norm of the attention output before it is added, where a family has one."""
    ffn_post_norm: str | None = None
    """Norm of the FFN output before it is added, where a family has one."""


LLAMA_PARTS = LayerParts(
    attention_norm="input_layernorm", attention="self_attn", ffn_norm="post_attention_layernorm", ffn="mlp"
)

GEMMA_PARTS = LayerParts(
    attention_norm="input_layernorm",
    attention="self_attn",
    ffn_norm="pre_feedforward_layernorm",
    ffn="mlp",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

TEXT_BACKBONES: dict[str, LayerParts] = {
    "llama": LLAMA_PARTS,
    "mistral": LLAMA_PARTS,
    "qwen2": LLAMA_PARTS,
    "qwen3": LLAMA_PARTS,
    "qwen2_vl_text": LLAMA_PARTS,
    "qwen2_5_vl_text": LLAMA_PARTS,
    "qwen3_vl_text": LLAMA_PARTS,
    "gemma3_text": GEMMA_PARTS,
}
"""Text model types that may stand under a family, and where the parts of their layers are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a transformers model of one `model_type` keeps what the sweep and the executors need."""

    label: str
    """Name people know the family by."""
    decoder: str
    """Dotted path from the model to the text decoder that owns `layers` and `norm`."""
    backbone: str
    """Dotted path to the module that runs vision tower and decoder up to the final norm."""
    head: str
    """Dotted path to the LM head."""
    visual_id_fields: tuple[str, ...]
    """Config fields that hold the ids of the placeholders which vision features replace."""
    positions_from_mask: bool
    """Whether positions are one per token, counted over the attention mask (else the model makes its own)."""
    pixels: Literal["rows", "tiles", "grid", "nested"]
    """How the images of a batch lie in `pixel_values` (`vision.LAYOUTS`)."""
    projector: str | None
    """Dotted path, from `backbone`, to the module whose rows become the visual rows, one for one."""
    unprojected: str = ""
    """Why there is no such module."""
    reorders: str | None = None
    """Dotted path, from `backbone`, to the module around the projector that gives its rows in another order."""


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
    unprojected="projected rows are cut to the image's shape and newline embeddings stand between them",
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

REFUSED: dict[str, str] = {
    "mllama": "its text reads the image through cross-attention layers, so there are no visual tokens to freeze",
    "qwen3_5": "its gated-delta layers mix tokens without K and V, so a frozen token cannot be read",
    "qwen3_5_moe": "its gated-delta layers mix tokens without K and V, so a frozen token cannot be read",
    "gemma3n": "its layers take inputs of their own and share K and V, so a layer cannot be ablated alone",
    "gemma4": "its layers take inputs of their own and share K and V, so a layer cannot be ablated alone",
}
"""Families that were looked at and cannot be supported, with the reason."""


def supported() -> str:
    """The supported families as one phrase for error messages."""
    return ", ".join(f"{family.label} ({model_type})" for model_type, family in FAMILIES.items())
