"""Small random models of every family and hand-made batches: built in milliseconds, without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": LAYERS},
    **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"pad_token_id": PAD_TOKEN, "bos_token_id": 1, "eos_token_id": 2},
    # Large enough that a removed layer is felt far above rounding.
    "initializer_range": 0.25,
}
_LLAMA = {**_TEXT, "model_type": "llama", "head_dim": 12}
_QWEN2 = {**_TEXT, "model_type": "qwen2"}


def _three_dimensional(*sections: int) -> dict[str, Any]:
    """Text positions of Qwen's models; the sections add up to half of a head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)}}


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_PATCHED = {**_TOWER, "image_size": 16, "patch_size": 4}
_QWEN_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
_QWEN_TOWER["out_hidden_size"] = 32
_QWEN_IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": VISION_START}
_QWEN_IDS["vision_end_token_id"] = 93
_PINPOINTS = {"image_grid_pinpoints": [[28, 56], [56, 28]]}

Images = Sequence[Sequence[Tensor]]
"""The images of each prompt."""


def _flat(images: Images, _: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image for own in images for image in own])}


def _anyres(images: Images, ids_BT: Tensor) -> dict[str, Tensor]:
    inputs = _flat(images, ids_BT)
    return {**inputs, "image_sizes": torch.tensor([[28, 56]] * len(inputs["pixel_values"]))}


def _grid(images: Images, ids_BT: Tensor) -> dict[str, Tensor]:
    pixels = _flat(images, ids_BT)["pixel_values"]
    return {
        "pixel_values": pixels.flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(pixels)),
        "mm_token_type_ids": (ids_BT == IMAGE_TOKEN).int(),
    }


def _nested(images: Images, _: Tensor) -> dict[str, Tensor]:
    most = max(len(own) for own in images)
    blank = torch.zeros(3, 16, 16)
    return {"pixel_values": torch.stack([torch.stack([*own, *[blank] * (most - len(own))]) for own in images])}


def _typed(images: Images, ids_BT: Tensor) -> dict[str, Tensor]:
    return {**_flat(images, ids_BT), "token_type_ids": (ids_BT == IMAGE_TOKEN).long()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A family under test: how its model is made, and what an image is for it."""

    name: str
    """What its classes in transformers are called, without `Config` and `ForConditionalGeneration`."""
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    config: Mapping[str, Any]
    """The rest of the configuration."""
    visual_tokens: int = 4
    """Visual tokens of one image."""
    pixels: tuple[int, ...] = (3, 16, 16)
    """Shape of one image's `pixel_values`."""
    extra: Callable[[Images, Tensor], dict[str, Tensor]] = _flat
    """Further inputs, from the images and the token ids."""
    start: tuple[int, ...] = ()
    """Text tokens that announce an image; older releases of transformers count Qwen's images by them."""

    def build(self, attn: str = "sdpa") -> Any:
        """Return a model with random weights."""
        parts = deepcopy({"text_config": self.text, "vision_config": self.vision, **self.config})
        config = getattr(hf, f"{self.name}Config")(**parts)
        return getattr(hf, f"{self.name}ForConditionalGeneration")._from_config(config, attn_implementation=attn)


def _llava(text: Mapping[str, Any]) -> Kind:
    ids = {"image_token_index": IMAGE_TOKEN}
    return Kind(name="Llava", text=text, vision=_CLIP, config=ids, pixels=(3, 28, 28))


def _next(name: str, text: Mapping[str, Any], vision: Mapping[str, Any], **config: Any) -> Kind:
    # 28 x 56 pixels: 4 tokens of the base image, 2 rows of 4 and a newline embedding after each.
    rest = {"image_token_index": IMAGE_TOKEN, **_PINPOINTS, **config}
    return Kind(
        name=name, text=text, vision=vision, config=rest, visual_tokens=14, pixels=(3, 3, 28, 28), extra=_anyres
    )


def _qwen(name: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Kind:
    return Kind(
        name=name, text=text, vision=vision, config=_QWEN_IDS, pixels=(16, 96), extra=_grid, start=(VISION_START,)
    )


def _idefics(name: str) -> Kind:
    config = {"image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": PAD_TOKEN}
    return Kind(name=name, text=_LLAMA, vision=_PATCHED, config=config, extra=_nested)


_QWEN2_VL_TEXT = {**_TEXT, **_three_dimensional(1, 1, 2)}
KINDS: dict[str, Kind] = {
    "llava": _llava(_LLAMA),
    "llava-mistral": _llava({**_TEXT, "model_type": "mistral", "sliding_window": None}),
    "llava-qwen2": _llava(_QWEN2),
    "llava-next": _next("LlavaNext", _LLAMA, _CLIP),
    "llava-onevision": _next(
        "LlavaOnevision",
        _QWEN2,
        {**_SIGLIP, "image_size": 28, "patch_size": 14},
        video_token_index=91,
        vision_feature_layer=-1,
    ),
    "qwen2-vl": _qwen(
        "Qwen2VL",
        _QWEN2_VL_TEXT,
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen2.5-vl": _qwen("Qwen2_5_VL", _QWEN2_VL_TEXT, {**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3-vl": _qwen(
        "Qwen3VL",
        {**_TEXT, "head_dim": 12, **_three_dimensional(2, 2, 2)},
        {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "internvl": Kind(
        name="InternVL",
        text={**_TEXT, "model_type": "qwen3", "head_dim": 12},
        vision={**_TOWER, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        config={"image_token_id": IMAGE_TOKEN},
    ),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "gemma3": Kind(
        name="Gemma3",
        text={
            **{**_TEXT, "model_type": "gemma3_text", "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision={**_SIGLIP, "image_size": 16, "patch_size": 4},
        config={
            **{"mm_tokens_per_image": 4, "image_token_index": IMAGE_TOKEN},
            **{"boi_token_index": 92, "eoi_token_index": 93},
        },
        extra=_typed,
    ),
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
