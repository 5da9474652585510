"""Time of a SAISA training step against a step of the dense model: forward and backward, interleaved.

The optimizer's step and the vision tower are left out, because they cost the same on both sides: the language model has
its published size and random weights, behind a stub of a vision tower.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.architecture import Architecture
from shortv.bench.device import seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.learned.saisa import saisa_flops_ratio
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import ProjectorSettings
from shortv.learned.saisa.run import ProjectedRun

_ANSWER = 16
"""Trained tokens at the end of each prompt; the rest of the text is the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Median seconds of a forward and a backward pass; the ratio is the median over pairs."""

    dense: float
    saisa: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Costs of the stage that trains projectors alone, and of the one that also trains the language model."""

    projectors: StepCost
    joint: StepCost
    flops_ratio: float
    """FLOPs of a SAISA prefill over those of the dense model with its one projector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A LLaVA of `shortv.bench.models` cut to `layers` layers, and a batch of its prompts."""

    shape: str
    layers: int = 2
    batch: int = 1
    text_tokens: int = 64
    pairs: int = 5
    dtype: str = "float32"
    device: str = "cpu"


def bench_training(case: Case) -> TrainingCost:
    """Time both stages, dense and SAISA interleaved.

    Raises Refused when the model is unknown or not a LLaVA-1.5.
    """
    known = published(case.shape)
    if known.kind != "llava":
        raise Refused(f"the training benchmark runs LLaVA-1.5 models only, and {case.shape!r} is not one")
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    model = random_model(case.shape, layers=case.layers, dtype=dtype, device=device, real_tower=False)
    decoder = decoder_of(model)
    parts = Projectors.build(decoder, ProjectorSettings(layers=tuple(range(case.layers)), language_model="all"))
    parts = parts.to(device, dtype).eval()
    modes = parts.settings.modes(case.layers)
    run = ProjectedRun(decoder, modes, parts)
    inputs = image_prompt(
        model, batch=case.batch, text_tokens=case.text_tokens, visual_tokens=known.visual_tokens, text_after=_ANSWER + 1
    )
    inputs["pixel_values"] = torch.zeros(case.batch, 3, 336, 336, device=device, dtype=dtype)

    def dense(joint: bool) -> float:
        trained = [decoder.projector, decoder.text, decoder.head] if joint else [decoder.projector]
        return _step(model, inputs, trained, nullcontext())

    def saisa(joint: bool) -> float:
        return _step(model, inputs, [parts if joint else parts.projectors], executing(model, modes, run))

    stages = []
    for joint in (False, True):
        dense(joint), saisa(joint)
        rounds = [(dense(joint), saisa(joint)) for _ in range(case.pairs)]
        stages.append(_cost(rounds))
    architecture = Architecture.from_config_dict(model.config.to_dict())
    ratio = saisa_flops_ratio(
        architecture, modes, case.text_tokens, known.visual_tokens, projector_weights=parts.projector_weights
    )
    return TrainingCost(projectors=stages[0], joint=stages[1], flops_ratio=ratio)


def _step(
    model: Any, inputs: dict[str, Tensor], trained: Sequence[nn.Module], under: AbstractContextManager[Any]
) -> float:
    """Seconds of a forward and a backward pass with gradients for the `trained` modules alone."""
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


def training_text(found: TrainingCost, case: Case) -> str:
    """Format both stages beside the FLOPs of a prefill."""
    lines = [
        f"{case.shape}, {case.layers} layers, batch {case.batch}, t = {case.text_tokens}, "
        f"v = {published(case.shape).visual_tokens}, {case.dtype} on {case.device}",
        f"{'forward and backward':28}{'dense, ms':>12}{'SAISA, ms':>12}{'of dense':>10}",
    ]
    for stage, cost in {"projectors": found.projectors, "projectors, language model": found.joint}.items():
        lines.append(f"{stage:28}{1e3 * cost.dense:>12.1f}{1e3 * cost.saisa:>12.1f}{cost.ratio:>10.3f}")
    return "\n".join([*lines, f"{'FLOPs of a prefill':28}{'':24}{found.flops_ratio:>10.3f}"])
