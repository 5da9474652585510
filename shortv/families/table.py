"""The supported model families, one row each: everything the project knows about their internals."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

TEXT_BACKBONES: dict[str, LayerParts] = {
    "llama": LLAMA_PARTS,
    "mistral": LLAMA_PARTS,
    "qwen2": LLAMA_PARTS,
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


_LLAVA = Family(
    label="LLaVA-1.5",
    decoder="model.language_model",
    backbone="model",
    head="lm_head",
    visual_id_fields=("image_token_id",),
    positions_from_mask=True,
)

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": replace(_LLAVA, label="LLaVA-NeXT"),
}
"""transformers `model_type` to family."""


def supported() -> str:
    """The supported families as one phrase for error messages."""
    return ", ".join(f"{family.label} ({model_type})" for model_type, family in FAMILIES.items())
