"""Small random models and hand-made batches: every shape a test needs, built in milliseconds and without files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from shortv.architecture import Architecture
from shortv.families import Batch, LoadedModel, decoder_of
from shortv.tokens import token_types

LAYERS = 4
VOCABULARY = 96
IMAGE_TOKEN = 90
PAD_TOKEN = 0

_TEXT = {
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
_VISION = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
_TEXT_CONFIGS = {
    "llama": LlamaConfig(**_TEXT, head_dim=12),
    "mistral": MistralConfig(**_TEXT, sliding_window=None),
    "qwen2": Qwen2Config(**_TEXT),
}
IMAGE_SIZE_NEXT = (28, 56)


def random_model(kind: str = "llava", *, seed: int = 0, attn: str = "sdpa") -> PreTrainedModel:
    """A random model by name: llava, llava-mistral, llava-qwen2 or llava-next; float32, evaluation mode."""
    torch.manual_seed(seed)
    text = _TEXT_CONFIGS.get(kind.removeprefix("llava-"), _TEXT_CONFIGS["llama"])
    if kind == "llava-next":
        config = LlavaNextConfig(
            vision_config=_VISION,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[28, 56], [56, 28]],
        )
        model: PreTrainedModel = LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attn)
    else:
        config = LlavaConfig(vision_config=_VISION, text_config=text, image_token_index=IMAGE_TOKEN)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn)
    return model.eval().requires_grad_(False)


def loaded(model: PreTrainedModel) -> LoadedModel:
    """Wrap a model the way `families.load` does; it has no processor."""
    return LoadedModel(
        name="random",
        revision=None,
        model=model,
        processor=None,
        decoder=decoder_of(model),
        architecture=Architecture.from_config_dict(model.config.to_dict()),
        device=torch.device("cpu"),
        context=256,
        chat_template=None,
    )


Spec = Sequence[int | str]
"""A prompt: numbers are so many text tokens, "I" is an image. [3, "I", 2] has text on both sides of an image."""


def batch_of(model: PreTrainedModel, specs: Sequence[Spec], *, padding: str = "left", seed: int = 0) -> Batch:
    """A padded batch; a prompt's tokens and pixels depend on its spec's place in `specs` and the seed alone."""
    rows = [_row(model, spec, seed * 1000 + number) for number, spec in enumerate(specs)]
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), PAD_TOKEN)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, (ids, _) in enumerate(rows):
        place = slice(width - len(ids), width) if padding == "left" else slice(0, len(ids))
        input_ids[number, place] = ids
        mask[number, place] = 1
    return make_batch(model, input_ids, mask, [pixels for _, images in rows for pixels in images])


def make_batch(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, images: Sequence[Tensor]) -> Batch:
    """Model inputs from token ids, their mask and the images in order."""
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    if images:
        inputs["pixel_values"] = torch.stack(list(images))
        if model.config.model_type == "llava_next":
            inputs["image_sizes"] = torch.tensor([IMAGE_SIZE_NEXT] * len(images))
    return Batch(inputs=inputs, types=token_types(input_ids, mask, {IMAGE_TOKEN}))


def one_of(batch: Batch, model: PreTrainedModel, specs: Sequence[Spec], number: int) -> Batch:
    """One prompt of a batch, alone and without padding."""
    real = batch.inputs["attention_mask"][number].bool()
    ids = batch.inputs["input_ids"][number][real][None]
    before = sum(list(spec).count("I") for spec in specs[:number])
    images = [] if "pixel_values" not in batch.inputs else list(batch.inputs["pixel_values"])
    own = images[before : before + list(specs[number]).count("I")]
    return make_batch(model, ids, torch.ones_like(ids), own)


def _row(model: PreTrainedModel, spec: Spec, seed: int) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    parts, images = [], []
    for item in spec:
        if item == "I":
            parts.append(torch.full((_visual_tokens(model),), IMAGE_TOKEN))
            patches = (3,) if model.config.model_type == "llava_next" else ()
            images.append(torch.randn(*patches, 3, 28, 28, generator=draw))
        else:
            parts.append(torch.randint(3, IMAGE_TOKEN, (int(item),), generator=draw))
    return torch.cat(parts), images


def _visual_tokens(model: PreTrainedModel) -> int:
    # LLaVA-NeXT, 28 x 56 pixels: 4 of the base image, 2 rows of 4, and a newline embedding after each row.
    return 4 + 2 * (4 + 1) if model.config.model_type == "llava_next" else 4
