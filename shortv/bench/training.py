"""Time of a SAISA training step against a step of the dense model: forward and backward, interleaved.

The optimizer's step and the vision tower are left out, because they cost the same on both sides: the language model has
its published size and random weights, behind a stub of a vision tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from shortv.architecture import Architecture
from shortv.bench.measuring import Timings, seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.bench.rows import Row
from shortv.bench.specs import TrainingBench
from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.learned.saisa import saisa_flops_ratio
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import ProjectorSettings
from shortv.learned.saisa.run import ProjectedRun

_ANSWER = 16
"""Trained tokens at the end of each prompt; the rest of the text is the prompt."""


def bench(spec: TrainingBench) -> Iterator[Row]:
    """Time the stage that trains projectors alone, and the one that also trains the language model.

    Raises Refused when the model is unknown or not a LLaVA-1.5.
    """
    known = published(spec.shape)
    if known.kind != "llava":
        raise Refused(f"the training benchmark runs LLaVA-1.5 models only, and {spec.shape!r} is not one")
    dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
    model = random_model(spec.shape, layers=spec.layers, dtype=dtype, device=device, real_tower=False)
    decoder = decoder_of(model)
    settings = ProjectorSettings(layers=tuple(range(spec.layers)), language_model="all")
    parts = Projectors.build(decoder, settings).to(device, dtype).eval()
    modes = settings.modes(spec.layers)
    run = ProjectedRun(decoder, modes, parts)
    visual_tokens = known.visual_tokens
    inputs = image_prompt(
        model,
        batch=spec.batch_size,
        text_tokens=spec.text_tokens,
        visual_tokens=visual_tokens,
        text_after=_ANSWER + 1,
    )
    inputs["pixel_values"] = torch.zeros(spec.batch_size, 3, 336, 336, device=device, dtype=dtype)

    def dense_step(trained: Sequence[nn.Module]) -> float:
        return _step(model, inputs, trained, nullcontext())

    def saisa_step(trained: Sequence[nn.Module]) -> float:
        return _step(model, inputs, trained, executing(model, modes, run))

    architecture = Architecture.from_config_dict(model.config.to_dict())
    flops_ratio = saisa_flops_ratio(
        architecture, modes, spec.text_tokens, visual_tokens, projector_weights=parts.projector_weights
    )
    stages: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {
        "projectors": ([decoder.projector], [parts.projectors]),
        "projectors and language model": ([decoder.projector, decoder.text, decoder.head], [parts]),
    }
    for stage, (dense, saisa) in stages.items():
        variants = {"dense": partial(dense_step, dense), "saisa": partial(saisa_step, saisa)}
        times = Timings.interleaved(variants, rounds=spec.pairs, device=device)
        case = f"{spec.shown(spec.layers, visual_tokens)}, {stage}; SAISA against dense"
        yield times.row(case, "saisa", "dense", flops_ratio_of_a_prefill=flops_ratio)


def _step(
    model: Any, inputs: dict[str, torch.Tensor], trained: Sequence[nn.Module], under: AbstractContextManager[Any]
) -> float:
    """Seconds of a forward and a backward pass with gradients for the `trained` modules alone."""

    def learn() -> None:
        logits_BTV = model(**inputs, use_cache=False, logits_to_keep=_ANSWER + 1).logits[:, :-1]
        labels_BT = inputs["input_ids"][:, -_ANSWER:]
        loss: Any = cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())
        loss.backward()

    for module in trained:
        module.requires_grad_(True)
    with under:
        taken = seconds(learn, model.device)
    for module in trained:
        module.requires_grad_(False)
        module.zero_grad(set_to_none=True)
    return taken
