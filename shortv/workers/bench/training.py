"""What a training step of SAISA costs against one of the dense model: forward and backward, interleaved.

The optimizer's step is left out: it costs the same per batch, and batches are large. So is the vision tower, which is
the same on both sides: the model here has real sizes and random weights behind a tower of next to nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.architecture import Architecture
from shortv.costs import saisa_flops_ratio
from shortv.families import decoder_of
from shortv.families.parts import Learned
from shortv.families.parts.saisa import Projectors, ProjectorSettings
from shortv.layers.apply import executing
from shortv.layers.roofline import seconds

SIZES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
VISUAL_TOKENS: Final = 576
_FEATURES = 1024
_IMAGE = 32000
_ANSWER = 16
"""Tokens that are learned from; the rest of the text is the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Median seconds of a forward and a backward pass; the ratio is the median over pairs."""

    dense: float
    saisa: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Of the stage that trains projectors alone, and of the one that trains the language model with them."""

    projectors: StepCost
    joint: StepCost
    flops_ratio: float
    """Of a prefill, SAISA's over the dense model's with its one projector."""


def bench_training(
    shape: str, *, layers: int, batch: int, text_tokens: int, pairs: int, dtype: torch.dtype, device: torch.device
) -> TrainingCost:
    """Time both stages on a shape of SIZES, cut to so many layers."""
    model = _random_model(shape, layers).to(device, dtype)
    decoder = decoder_of(model)
    parts = Projectors.build(decoder, ProjectorSettings(layers=tuple(range(layers)), language_model="all"))
    parts = parts.to(device, dtype).eval()
    modes, learned = parts.settings.modes(layers), Learned(parts=parts)
    inputs = _inputs(model, batch, text_tokens)

    def dense(joint: bool) -> float:
        trained = [decoder.projector, decoder.text, decoder.head] if joint else [decoder.projector]
        return _step(model, inputs, trained, nullcontext())

    def saisa(joint: bool) -> float:
        return _step(model, inputs, [parts if joint else parts.projectors], executing(model, modes, learned))

    stages = []
    for joint in (False, True):
        dense(joint), saisa(joint)
        rounds = [(dense(joint), saisa(joint)) for _ in range(pairs)]
        stages.append(_cost(rounds))
    architecture = Architecture.from_config_dict(model.config.to_dict())
    ratio = saisa_flops_ratio(
        architecture, modes, text_tokens, VISUAL_TOKENS, projector_weights=parts.projector_weights
    )
    return TrainingCost(projectors=stages[0], joint=stages[1], flops_ratio=ratio)


def _step(
    model: Any, inputs: dict[str, Tensor], trained: Sequence[nn.Module], under: AbstractContextManager[Any]
) -> float:
    """Seconds of a forward and a backward pass with gradients for these modules alone."""
    for module in trained:
        module.requires_grad_(True)

    def learn() -> None:
        logits_BTV = model(**inputs, use_cache=False, logits_to_keep=_ANSWER + 1).logits[:, :-1]
        labels_BT = inputs["input_ids"][:, -_ANSWER:]
        loss: Any = cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())
        loss.backward()

    with under:
        taken = seconds(learn, model.device)
    for module in trained:
        module.requires_grad_(False)
        module.zero_grad(set_to_none=True)
    return taken


def _cost(rounds: Sequence[tuple[float, float]]) -> StepCost:
    dense, saisa = (statistics.median(column) for column in zip(*rounds, strict=True))
    return StepCost(dense=dense, saisa=saisa, ratio=statistics.median(saisa / dense for dense, saisa in rounds))


def _random_model(shape: str, layers: int) -> Any:
    text = hf.LlamaConfig(
        vocab_size=_IMAGE + 64, num_hidden_layers=layers, max_position_embeddings=4096, **SIZES[shape]
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=_FEATURES,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=336,
        patch_size=14,
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE)
    torch.manual_seed(0)
    build: Any = hf.LlavaForConditionalGeneration._from_config
    model = build(config, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _inputs(model: Any, batch: int, text_tokens: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, 1000, (batch, text_tokens + VISUAL_TOKENS), generator=draw)
    # The place of the image in LLaVA-1.5's prompt, as long as there is text enough around it.
    start = min(35, text_tokens - _ANSWER - 1)
    ids_BT[:, start : start + VISUAL_TOKENS] = _IMAGE
    pixels = torch.randn(batch, 3, 336, 336, generator=draw)
    return {
        "input_ids": ids_BT.to(model.device),
        "attention_mask": torch.ones_like(ids_BT).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
