"""Published models by their sizes, built with random weights, so that speed is measured without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families import decoder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """Sizes of a published model, with the frozen layers and visual tokens per image that its paper reports."""

    kind: str
    """llava, llava_next or qwen2_5_vl."""
    text: Mapping[str, Any]
    """Keyword arguments of the text model's configuration."""
    frozen: int
    visual_tokens: int
    real_tower: bool = True
    """Whether the vision tower has its published size; False for a language model behind a small stub."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the published model."""
        return int(self.text["num_hidden_layers"])

    def build(self, *, layers: int | None = None, real_tower: bool = True) -> tuple[Any, Any]:
        """Return the model class and its configuration, cut to the first `layers` decoder layers."""
        import transformers as hf

        text = {**self.text, "num_hidden_layers": layers or self.num_layers}
        if self.kind == "qwen2_5_vl":
            vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
            tower = {**vision, "out_hidden_size": text["hidden_size"]}
            return hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower)
        sizes = _CLIP if real_tower and self.real_tower else _STUB_TOWER
        arguments: dict[str, Any] = {
            "text_config": hf.LlamaConfig(max_position_embeddings=4096, **text),
            "vision_config": hf.CLIPVisionConfig(hidden_size=1024, image_size=336, patch_size=14, **sizes),
            "image_token_index": 32000,
        }
        if self.kind == "llava_next":
            return hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(**arguments)
        return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**arguments)

    def pixels(self, batch: int, visual_tokens: int) -> dict[str, torch.Tensor]:
        """Return the vision tower's inputs for `batch` prompts with at least `visual_tokens` visual tokens each."""
        if self.kind == "qwen2_5_vl":
            # Two rows of tokens; a token is 2 x 2 patches of 14 x 14 pixels in two frames.
            columns = -(-visual_tokens // 2)
            patches = torch.zeros(batch * 8 * columns, 3 * 2 * 14 * 14)
            return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 2 * columns]] * batch)}
        if self.kind == "llava_next":
            # Two by two tiles and the whole image: five times 576 patches, as the paper counts.
            images = batch * -(-visual_tokens // 2880)
            pixels = torch.zeros(images, 5, 3, 336, 336)
            return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]] * images)}
        return {"pixel_values": torch.zeros(batch * -(-visual_tokens // 576), 3, 336, 336)}

    def architecture(self, layers: int | None = None) -> Architecture:
        """Return the sizes that the cost formulas use."""
        return Architecture.from_config_dict(self.build(layers=layers)[1].to_dict())

    def parameters(self) -> int:
        """Count the parameters of the whole model without allocating them."""
        model_class, config = self.build()
        with torch.device("meta"):
            return sum(weight.numel() for weight in model_class._from_config(config).parameters())


_CLIP: Mapping[str, Any] = {"intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_STUB_TOWER: Mapping[str, Any] = {"intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int | None = None, vocabulary: int = 32064) -> Any:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocabulary,
    }


_VICUNA_7B, _VICUNA_13B = _llama(32, 4096, 11008, 32), _llama(40, 5120, 13824, 40)
_QWEN2_5_7B = {
    **_llama(28, 3584, 18944, 28, 4, 152064),
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}

MODELS: Final[dict[str, PublishedModel]] = {
    "llava-1.5-7b": PublishedModel(kind="llava", text=_VICUNA_7B, frozen=19, visual_tokens=576),
    "llava-1.5-13b": PublishedModel(kind="llava", text=_VICUNA_13B, frozen=24, visual_tokens=576),
    "llava-next-7b": PublishedModel(kind="llava_next", text=_VICUNA_7B, frozen=19, visual_tokens=2880),
    "llava-next-13b": PublishedModel(kind="llava_next", text=_VICUNA_13B, frozen=24, visual_tokens=2880),
    "qwen2.5-vl-7b": PublishedModel(kind="qwen2_5_vl", text=_QWEN2_5_7B, frozen=7, visual_tokens=1024),
    "tinyllama-1.1b": PublishedModel(
        kind="llava", text=_llama(22, 2048, 5632, 32, 4), frozen=13, visual_tokens=576, real_tower=False
    ),
    "smollm2-135m": PublishedModel(
        kind="llava", text=_llama(30, 576, 1536, 9, 3, 49152), frozen=18, visual_tokens=576, real_tower=False
    ),
}
"""Models of the paper (ShortV table 1), one of a later paper (V-Skip: N = 7), and two that fit a laptop."""


def published(name: str) -> PublishedModel:
    """Return the model of this name; raises Refused when MODELS does not list it."""
    if name not in MODELS:
        raise Refused(f"unknown shape {name!r}; the shapes are {', '.join(MODELS)}")
    return MODELS[name]


def random_model(
    name: str, *, layers: int | None, dtype: torch.dtype, device: torch.device, real_tower: bool = True
) -> Any:
    """Build a model of MODELS with random weights, cut to `layers` decoder layers, in evaluation mode."""
    from transformers.initialization import no_init_weights

    model_class, config = published(name).build(layers=layers, real_tower=real_tower)
    with no_init_weights(), device:
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    draw = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            # Norm weights are vectors; the rest only has to keep activations in range.
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02, generator=draw)
    return model.eval().requires_grad_(False)


def image_prompt(
    model: Any, *, batch: int, text_tokens: int, visual_tokens: int, text_after: int = 1
) -> dict[str, torch.Tensor]:
    """Random prompts with image placeholders but no pixels: the decoder costs the same without the vision tower.

    The image starts after 35 text tokens, as in LLaVA-1.5's prompt, or earlier to leave `text_after` tokens behind it.
    """
    visual_id = min(decoder_of(model).visual_ids)
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, min(1000, visual_id), (batch, text_tokens + visual_tokens), generator=draw)
    start = min(35, text_tokens - text_after)
    ids_BT[:, start : start + visual_tokens] = visual_id
    return {"input_ids": ids_BT.to(model.device), "attention_mask": torch.ones_like(ids_BT).to(model.device)}
