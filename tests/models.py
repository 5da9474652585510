"""Small random models of every family and hand-made batches: built in milliseconds, without files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from shortv.families import Batch, LoadedModel, wrap
from shortv.families.preprocessing import positions_of
from shortv.families.tokens import token_types

LAYERS = 4
VOCABULARY = 96
IMAGE_TOKEN = 90
PAD_TOKEN = 0
VISION_START = 92

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that a removed layer is felt far above rounding.
    "initializer_range": 0.25,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# Text positions that are three-dimensional; the sections add up to half of a head.
_QWEN2_VL_TEXT = {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
_QWEN3_VL_TEXT = {**_TEXT, "head_dim": 12, "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2]}}
_CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_PATCHES = {"image_size": 28, "patch_size": 14}
_QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": 93,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A family under test: how its model is made, and what an image is for it."""

    build: Callable[[str], Any]
    visual_tokens: int
    """Visual tokens of one image."""
    pixels: tuple[int, ...]
    """Shape of one image's `pixel_values`."""
    extra: Callable[[Sequence[Sequence[Tensor]], Tensor], dict[str, Tensor]]
    """Further inputs, from the images of each prompt and the token ids."""
    start: tuple[int, ...] = ()
    """Text tokens that announce an image; older releases of transformers count Qwen's images by them."""


def _make(model: Any, config: Any, attn: str) -> Any:
    return model._from_config(config, attn_implementation=attn)


def _llava(text: Callable[[], Any]) -> Callable[[str], Any]:
    def build(attn: str) -> Any:
        vision = hf.CLIPVisionConfig(**_CLIP, **_PATCHES)
        config = hf.LlavaConfig(vision_config=vision, text_config=text(), image_token_index=IMAGE_TOKEN)
        return _make(hf.LlavaForConditionalGeneration, config, attn)

    return build


def _llava_next(attn: str) -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_CLIP, **_PATCHES),
        text_config=_llama(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    return _make(hf.LlavaNextForConditionalGeneration, config, attn)


def _llava_onevision(attn: str) -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_CLIP, **_PATCHES, vision_use_head=False),
        text_config=_qwen2(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=91,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        vision_feature_layer=-1,
    )
    return _make(hf.LlavaOnevisionForConditionalGeneration, config, attn)


def _qwen2_vl(attn: str) -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config=_QWEN2_VL_TEXT,
        vision_config=vision,
        **_QWEN_IDS,
    )
    return _make(hf.Qwen2VLForConditionalGeneration, config, attn)


def _qwen2_5_vl(attn: str) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=_QWEN2_VL_TEXT,
        vision_config=vision,
        **_QWEN_IDS,
    )
    return _make(hf.Qwen2_5_VLForConditionalGeneration, config, attn)


def _qwen3_vl(attn: str) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = hf.Qwen3VLConfig(text_config=_QWEN3_VL_TEXT, vision_config=vision, **_QWEN_IDS)
    return _make(hf.Qwen3VLForConditionalGeneration, config, attn)


def _internvl(attn: str) -> Any:
    vision = hf.InternVLVisionConfig(**_CLIP, image_size=[16, 16], patch_size=[4, 4])
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen3Config(**_TEXT, head_dim=12), image_token_id=IMAGE_TOKEN
    )
    return _make(hf.InternVLForConditionalGeneration, config, attn)


def _idefics(config: Any, vision: Any, model: Any) -> Callable[[str], Any]:
    def build(attn: str) -> Any:
        made = config(
            vision_config=vision(**_CLIP, image_size=16, patch_size=4).to_dict(),
            text_config=_llama(),
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
            pad_token_id=PAD_TOKEN,
        )
        return _make(model, made, attn)

    return build


def _gemma3(attn: str) -> Any:
    text = hf.Gemma3TextConfig(
        **_TEXT,
        head_dim=12,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=12,
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=hf.SiglipVisionConfig(**_CLIP, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return _make(hf.Gemma3ForConditionalGeneration, config, attn)


def _llama() -> Any:
    return hf.LlamaConfig(**_TEXT, head_dim=12)


def _mistral() -> Any:
    return hf.MistralConfig(**_TEXT, sliding_window=None)


def _qwen2() -> Any:
    return hf.Qwen2Config(**_TEXT)


def _flat(images: Sequence[Sequence[Tensor]], _: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image for own in images for image in own])}


def _anyres(images: Sequence[Sequence[Tensor]], ids: Tensor) -> dict[str, Tensor]:
    inputs = _flat(images, ids)
    return {**inputs, "image_sizes": torch.tensor([[28, 56]] * len(inputs["pixel_values"]))}


def _grid(images: Sequence[Sequence[Tensor]], ids_BT: Tensor) -> dict[str, Tensor]:
    inputs = _flat(images, ids_BT)
    count = len(inputs["pixel_values"])
    return {
        "pixel_values": inputs["pixel_values"].flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
        "mm_token_type_ids": (ids_BT == IMAGE_TOKEN).int(),
    }


def _nested(images: Sequence[Sequence[Tensor]], _: Tensor) -> dict[str, Tensor]:
    most = max(len(own) for own in images)
    blank = torch.zeros(3, 16, 16)
    return {"pixel_values": torch.stack([torch.stack([*own, *[blank] * (most - len(own))]) for own in images])}


def _typed(images: Sequence[Sequence[Tensor]], ids_BT: Tensor) -> dict[str, Tensor]:
    return {**_flat(images, ids_BT), "token_type_ids": (ids_BT == IMAGE_TOKEN).long()}


# LLaVA-NeXT and OneVision, 28 x 56 pixels: 4 tokens of the base image, 2 rows of 4 and a newline embedding after each.
KINDS: dict[str, Kind] = {
    "llava": Kind(build=_llava(_llama), visual_tokens=4, pixels=(3, 28, 28), extra=_flat),
    "llava-mistral": Kind(build=_llava(_mistral), visual_tokens=4, pixels=(3, 28, 28), extra=_flat),
    "llava-qwen2": Kind(build=_llava(_qwen2), visual_tokens=4, pixels=(3, 28, 28), extra=_flat),
    "llava-next": Kind(build=_llava_next, visual_tokens=14, pixels=(3, 3, 28, 28), extra=_anyres),
    "llava-onevision": Kind(build=_llava_onevision, visual_tokens=14, pixels=(3, 3, 28, 28), extra=_anyres),
    "qwen2-vl": Kind(build=_qwen2_vl, visual_tokens=4, pixels=(16, 96), extra=_grid, start=(VISION_START,)),
    "qwen2.5-vl": Kind(build=_qwen2_5_vl, visual_tokens=4, pixels=(16, 96), extra=_grid, start=(VISION_START,)),
    "qwen3-vl": Kind(build=_qwen3_vl, visual_tokens=4, pixels=(16, 96), extra=_grid, start=(VISION_START,)),
    "internvl": Kind(build=_internvl, visual_tokens=4, pixels=(3, 16, 16), extra=_flat),
    "idefics3": Kind(
        build=_idefics(hf.Idefics3Config, hf.Idefics3VisionConfig, hf.Idefics3ForConditionalGeneration),
        visual_tokens=4,
        pixels=(3, 16, 16),
        extra=_nested,
    ),
    "smolvlm": Kind(
        build=_idefics(hf.SmolVLMConfig, hf.SmolVLMVisionConfig, hf.SmolVLMForConditionalGeneration),
        visual_tokens=4,
        pixels=(3, 16, 16),
        extra=_nested,
    ),
    "gemma3": Kind(build=_gemma3, visual_tokens=4, pixels=(3, 16, 16), extra=_typed),
}


def random_model(kind: str = "llava", *, seed: int = 0, attn: str = "sdpa") -> Any:
    """A random model of a kind in `KINDS`; float32, evaluation mode."""
    torch.manual_seed(seed)
    return KINDS[kind].build(attn).eval().requires_grad_(False)


def loaded(model: Any) -> LoadedModel:
    """Wrap a model as `families.load` does, without a processor."""
    return wrap(model, name="random")


Spec = Sequence[int | str]
"""A prompt: numbers are so many text tokens, "I" is an image. [3, "I", 2] has text on both sides of an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt without padding."""

    ids_T: Tensor
    images: tuple[Tensor, ...]


def prompts_of(kind: str, specs: Sequence[Spec], *, seed: int = 0) -> list[Prompt]:
    """Prompts whose tokens and pixels depend on their place in `specs` and on the seed alone."""
    return [_prompt(KINDS[kind], spec, seed * 1000 + number) for number, spec in enumerate(specs)]


def batch_of(kind: str, specs: Sequence[Spec], *, padding: str = "left", seed: int = 0) -> Batch:
    """A padded batch of `prompts_of`."""
    return make_batch(kind, prompts_of(kind, specs, seed=seed), padding=padding)


def make_batch(kind: str, prompts: Sequence[Prompt], *, padding: str = "left") -> Batch:
    """Pad prompts into model inputs."""
    width = max(len(prompt.ids_T) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), PAD_TOKEN)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        length = len(prompt.ids_T)
        place = slice(width - length, width) if padding == "left" else slice(0, length)
        input_ids[number, place] = prompt.ids_T
        mask[number, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if KINDS[kind].extra is not _grid:
        inputs["position_ids"] = positions_of(mask)
    if any(prompt.images for prompt in prompts):
        inputs |= KINDS[kind].extra([prompt.images for prompt in prompts], input_ids)
    return Batch(inputs=inputs, types=token_types(input_ids, mask, {IMAGE_TOKEN}))


def _prompt(kind: Kind, spec: Spec, seed: int) -> Prompt:
    draw = torch.Generator().manual_seed(seed)
    parts, images = [], []
    for item in spec:
        if item == "I":
            parts.append(torch.tensor([*kind.start, *[IMAGE_TOKEN] * kind.visual_tokens]))
            images.append(torch.randn(*kind.pixels, generator=draw))
        else:
            parts.append(torch.randint(3, IMAGE_TOKEN, (int(item),), generator=draw))
    return Prompt(ids_T=torch.cat(parts), images=tuple(images))
