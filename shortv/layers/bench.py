"""Prefill time of a model under a plan against the full model: one process, interleaved pairs, and the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from shortv.architecture import Architecture
from shortv.costs import flops_ratio
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.layers.roofline import Device, measure_device, roofline_seconds, seconds
from shortv.plan import Mode

Executor = Callable[[Any, Sequence[Mode]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Times of one plan's prefill; ratios are medians over pairs with the full model."""

    full: float
    fast: float
    reference: float
    """Median seconds."""
    fast_ratio: float
    layer_ratio: float
    """Marginal time of a frozen layer over that of a full one, from the whole depth and half of it."""
    flops_ratio: float
    roofline_ratio: float
    tower: float
    """Median seconds of the vision tower and projector; 0 where it was not run."""
    tower_ratio: float
    """Fast over full with the tower's time on both sides."""
    device: Device
    peak_full: int
    peak_fast: int
    """Bytes of the allocator's peak (CUDA; 0 elsewhere)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is prefilled: a batch of prompts of t text and v visual tokens, the image first after some text."""

    batch: int
    text_tokens: int
    visual_tokens: int


def bench_prefill(
    model: Any, modes: Sequence[Mode], work: Workload, *, pairs: int, pixels: dict[str, torch.Tensor] | None = None
) -> Prefill:
    """Time full, fast and reference prefills of the decoder, and the vision tower on `pixels`, interleaved."""
    rounds, peaks = _measure(model, modes, work, pairs, pixels)
    full, fast, all_frozen, half_full, half_frozen, slow, tower = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    architecture = Architecture.from_config_dict(model.config.to_dict())
    limits = measure_device(model.device, model.dtype)

    def least(modes: Sequence[Mode]) -> float:
        return roofline_seconds(
            architecture,
            modes,
            batch=work.batch,
            t=work.text_tokens,
            v=work.visual_tokens,
            itemsize=model.dtype.itemsize,
            device=limits,
        )

    return Prefill(
        full=full,
        fast=fast,
        reference=slow,
        fast_ratio=statistics.median(row[1] / row[0] for row in rounds),
        layer_ratio=(all_frozen - half_frozen) / (full - half_full),
        flops_ratio=flops_ratio(architecture, modes, work.text_tokens, work.visual_tokens),
        roofline_ratio=least(modes) / least((Mode.FULL,) * len(modes)),
        tower=tower,
        tower_ratio=statistics.median((row[1] + row[-1]) / (row[0] + row[-1]) for row in rounds),
        device=limits,
        peak_full=peaks[0],
        peak_fast=peaks[1],
    )


def _measure(
    model: Any, modes: Sequence[Mode], work: Workload, pairs: int, pixels: dict[str, torch.Tensor] | None
) -> tuple[list[list[float]], list[int]]:
    """Seconds of every way in each round, the vision tower last, and the peak memory of full and fast."""
    decoder, device = decoder_of(model), model.device
    inputs = _inputs(model, min(decoder.visual_ids), work)
    text: Any = decoder.text
    every = text.layers
    depth = len(decoder.layers)

    def run(executor: Executor | None, modes: Sequence[Mode]) -> float:
        text.layers = every[: len(modes)]
        try:
            if executor is None:
                return seconds(lambda: model(**inputs, logits_to_keep=1), device)
            with executor(model, modes):
                return seconds(lambda: model(**inputs, logits_to_keep=1), device)
        finally:
            text.layers = every

    def see() -> float:
        if pixels is None:
            return 0.0
        moved = {
            name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in pixels.items()
        }
        return seconds(lambda: model.get_image_features(**moved), device)

    frozen = (Mode.FREEZE_VISUAL,) * depth
    half = depth // 2
    ways: list[tuple[Executor | None, Sequence[Mode]]] = [
        (None, modes),
        (executing, modes),
        (executing, frozen),
        (None, modes[:half]),
        (executing, frozen[:half]),
        (reference, modes),
    ]
    with torch.inference_mode():
        peaks = [_peak(device, lambda way=way: run(*way)) for way in ways[:2]]  # type: ignore[misc]
        for way in ways[2:]:
            run(*way)
        see()
        rounds = [[*(run(*way) for way in ways), see()] for _ in range(pairs)]
    return rounds, peaks


def _inputs(model: Any, visual_id: int, work: Workload) -> dict[str, torch.Tensor]:
    """Placeholders without pixels: the vision tower runs outside of the decoder and costs the same under any plan."""
    draw = torch.Generator().manual_seed(0)
    length = work.text_tokens + work.visual_tokens
    ids = torch.randint(3, min(1000, visual_id), (work.batch, length), generator=draw)
    # The place of the image in LLaVA-1.5's prompt, as long as there is text enough before it.
    start = min(35, work.text_tokens - 1)
    ids[:, start : start + work.visual_tokens] = visual_id
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def _peak(device: torch.device, action: Callable[[], object]) -> int:
    if device.type != "cuda":
        action()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return int(torch.cuda.max_memory_allocated(device))
