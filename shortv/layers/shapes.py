"""Models of named real shapes with random weights, for measuring speed without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """A real model's sizes, with the frozen layers and visual tokens that the paper reports for it."""

    build: Callable[[int | None], tuple[Any, Any]]
    num_layers: int
    frozen: int
    visual_tokens: int
    pixels: Callable[[int, int], dict[str, torch.Tensor]]
    """What the vision tower is given for a batch of prompts with at least so many visual tokens each."""


def random_shape(name: str, *, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a model of a shape in `SHAPES`, cut to its first `layers` decoder layers, in evaluation mode."""
    model_class, config = SHAPES[name].build(layers)
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.to_empty(device=device)
    draw = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            # Norm weights are vectors; the rest only has to keep activations in range.
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02, generator=draw)
        _restore_buffers(model, model_class, config)
    return model.eval().requires_grad_(False)


def _restore_buffers(model: Any, model_class: Any, config: Any) -> None:
    """Give the buffers (rotary frequencies, position ids) the values that an ordinary construction computes."""
    for name, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        if "inv_freq" in own:
            fresh = type(module)(module.config)
            for key, value in dict(fresh.named_buffers(recurse=False)).items():
                own[key].copy_(value)
        elif "position_ids" in own:
            own["position_ids"].copy_(torch.arange(own["position_ids"].shape[-1]).expand_as(own["position_ids"]))
        elif own:
            raise NotImplementedError(f"{name} of {model_class.__name__} has buffers {sorted(own)} without a rule")


def _llava(next_: bool, hidden: int, ffn: int, heads: int, num_layers: int) -> Callable[[int | None], tuple[Any, Any]]:
    def build(layers: int | None) -> tuple[Any, Any]:
        import transformers as hf

        text = hf.LlamaConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers or num_layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        )
        vision = hf.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        config = hf.LlavaNextConfig if next_ else hf.LlavaConfig
        model = hf.LlavaNextForConditionalGeneration if next_ else hf.LlavaForConditionalGeneration
        return model, config(vision_config=vision, text_config=text, image_token_index=32000)

    return build


def _qwen2_5_vl_7b(layers: int | None) -> tuple[Any, Any]:
    import transformers as hf

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers or 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    }
    # transformers' own default width is another model's.
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 3584}
    return hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def _llava_pixels(batch: int, visual_tokens: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(batch * -(-visual_tokens // 576), 3, 336, 336)}


def _llava_next_pixels(batch: int, visual_tokens: int) -> dict[str, torch.Tensor]:
    """Images of two by two tiles and the whole: five times 576 patches, as the paper counts."""
    images = batch * -(-visual_tokens // 2880)
    return {"pixel_values": torch.zeros(images, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]] * images)}


def _qwen_pixels(batch: int, visual_tokens: int) -> dict[str, torch.Tensor]:
    """One image of two rows of tokens; four patches of 14 x 14 pixels in two frames make a token."""
    columns = -(-visual_tokens // 2)
    return {
        "pixel_values": torch.zeros(batch * 8 * columns, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 2 * columns]] * batch),
    }


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape(_llava(False, 4096, 11008, 32, 32), 32, 19, 576, _llava_pixels),
    "llava-1.5-13b": Shape(_llava(False, 5120, 13824, 40, 40), 40, 24, 576, _llava_pixels),
    "llava-next-7b": Shape(_llava(True, 4096, 11008, 32, 32), 32, 19, 2880, _llava_next_pixels),
    "llava-next-13b": Shape(_llava(True, 5120, 13824, 40, 40), 40, 24, 2880, _llava_next_pixels),
    "qwen2.5-vl-7b": Shape(_qwen2_5_vl_7b, 28, 7, 1024, _qwen_pixels),
}
"""Shapes of the paper (ShortV table 1: frozen layers, visual tokens) and of a later model (V-Skip: N = 7)."""
