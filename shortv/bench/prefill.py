"""Prefill time of a model under a plan against the full model and the roofline, in interleaved pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from shortv.architecture import Architecture
from shortv.bench.device import DeviceLimits, measure_limits, peak_bytes, seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.costs import count_of, flops_ratio
from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.plan import WORK, Mode

Executor = Callable[[Any, Sequence[Mode]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Times of one plan's prefill; ratios are medians over pairs with the full model."""

    full: float
    """Median seconds, as `fast`, `reference` and `tower`."""
    fast: float
    reference: float
    fast_ratio: float
    layer_ratio: float
    """Time of a frozen layer over that of a full one: the difference between the whole depth and half of it."""
    flops_ratio: float
    roofline_ratio: float
    tower: float
    """Vision tower and projector; 0 where they were not run."""
    tower_ratio: float
    """Fast over full with the tower's time on both sides."""
    limits: DeviceLimits
    peak_full: int
    peak_fast: int
    """Peak bytes of the allocator (CUDA; 0 elsewhere)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A batch of prompts with one image each; text and visual tokens are counted per prompt."""

    batch: int
    text_tokens: int
    visual_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCase:
    """A published model with its last `frozen` layers frozen; 0 means all layers, the paper's share, its tokens."""

    shape: str
    layers: int = 0
    frozen: int = 0
    batch: int = 1
    text_tokens: int = 64
    visual_tokens: int = 0
    vision_tower: bool = False
    pairs: int = 7

    @property
    def depth(self) -> int:
        """Layers of the model that is built."""
        return self.layers or published(self.shape).num_layers

    @property
    def frozen_layers(self) -> int:
        """Frozen layers of this depth."""
        known = published(self.shape)
        return self.frozen or max(1, round(self.depth * known.frozen / known.num_layers))

    @property
    def work(self) -> Workload:
        """The batch to prefill."""
        visual = self.visual_tokens or published(self.shape).visual_tokens
        return Workload(batch=self.batch, text_tokens=self.text_tokens, visual_tokens=visual)

    @property
    def shown(self) -> str:
        """The case in one line."""
        return (
            f"{self.shape}, {self.depth} layers, {self.frozen_layers} frozen, batch {self.batch}, "
            f"t = {self.text_tokens}, v = {self.work.visual_tokens}"
        )


def bench_case(case: PrefillCase, *, dtype: str, device: str) -> Prefill:
    """Build the case's model and time it; raises Refused when the shape does not have the layers."""
    known, depth, frozen = published(case.shape), case.depth, case.frozen_layers
    if depth > known.num_layers or frozen > depth:
        raise Refused(f"{frozen} frozen of {depth} layers cannot be: {case.shape} has {known.num_layers}")
    model = random_model(case.shape, layers=depth, dtype=getattr(torch, dtype), device=torch.device(device))
    modes = (Mode.FULL,) * (depth - frozen) + (Mode.FREEZE_VISUAL,) * frozen
    pixels = known.pixels(case.batch, case.work.visual_tokens) if case.vision_tower else None
    return bench_prefill(model, modes, case.work, pairs=case.pairs, pixels=pixels)


def bench_prefill(
    model: Any, modes: Sequence[Mode], work: Workload, *, pairs: int, pixels: dict[str, torch.Tensor] | None = None
) -> Prefill:
    """Time full, fast and reference prefills of the decoder, and the vision tower on `pixels`, interleaved."""
    rounds, peaks = _measure(model, modes, work, pairs, pixels)
    full, fast, all_frozen, half_full, half_frozen, slow, tower = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    architecture = Architecture.from_config_dict(model.config.to_dict())
    limits = measure_limits(model.device, model.dtype)
    itemsize = model.dtype.itemsize
    least, least_full = (
        roofline_seconds(architecture, plan, work, itemsize=itemsize, limits=limits)
        for plan in (modes, (Mode.FULL,) * len(modes))
    )
    return Prefill(
        full=full,
        fast=fast,
        reference=slow,
        fast_ratio=statistics.median(row[1] / row[0] for row in rounds),
        layer_ratio=(all_frozen - half_frozen) / (full - half_full),
        flops_ratio=flops_ratio(architecture, modes, work.text_tokens, work.visual_tokens),
        roofline_ratio=least / least_full,
        tower=tower,
        tower_ratio=statistics.median((row[1] + row[-1]) / (row[0] + row[-1]) for row in rounds),
        limits=limits,
        peak_full=peaks[0],
        peak_fast=peaks[1],
    )


def roofline_seconds(
    architecture: Architecture, modes: Sequence[Mode], work: Workload, *, itemsize: int, limits: DeviceLimits
) -> float:
    """Least seconds of all layers' matrix products, each at peak FLOP rate or full bandwidth.

    Norms, softmax and copies are left out.
    """
    return sum(
        max(2 * rows * inner * columns * count / limits.flops, moved * itemsize / limits.bandwidth)
        for mode in modes
        for rows, inner, columns, count, moved in _products(architecture, mode, work)
    )


def _products(architecture: Architecture, mode: Mode, work: Workload) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, inner size, columns, number, and elements moved, of each matrix product of one layer."""
    hidden = architecture.hidden_size
    query_width = architecture.num_heads * architecture.head_dim
    key_width = architecture.num_kv_heads * architecture.head_dim
    queries, keys, ffn = (count_of(tokens, work.text_tokens, work.visual_tokens) for tokens in WORK[mode])

    def linear(tokens: int, inner: int, columns: int, count: int) -> tuple[int, int, int, int, int]:
        rows = work.batch * tokens
        return rows, inner, columns, count, count * (rows * inner + inner * columns + rows * columns) if rows else 0

    yield linear(queries, hidden, query_width, 1)
    yield linear(keys, hidden, key_width, 2)
    yield linear(queries, query_width, hidden, 1)
    yield linear(ffn, hidden, architecture.intermediate_size, 2)
    yield linear(ffn, architecture.intermediate_size, hidden, 1)
    # A fused kernel keeps the scores on the chip: queries, keys, values and outputs are what moves.
    moved = work.batch * (2 * queries * query_width + 2 * keys * key_width)
    yield queries, query_width, keys, 2 * work.batch, moved if queries else 0


def _measure(
    model: Any, modes: Sequence[Mode], work: Workload, pairs: int, pixels: dict[str, torch.Tensor] | None
) -> tuple[list[list[float]], list[int]]:
    """Seconds of each variant per round, the vision tower last, and the peak memory of full and fast."""
    decoder, device = decoder_of(model), model.device
    inputs = image_prompt(model, batch=work.batch, text_tokens=work.text_tokens, visual_tokens=work.visual_tokens)
    text: Any = decoder.text
    every = text.layers

    def run(executor: Executor | None, modes: Sequence[Mode]) -> float:
        text.layers = every[: len(modes)]
        try:
            if executor is None:
                return seconds(lambda: model(**inputs, logits_to_keep=1), device)
            with executor(model, modes):
                return seconds(lambda: model(**inputs, logits_to_keep=1), device)
        finally:
            text.layers = every

    def run_tower() -> float:
        if pixels is None:
            return 0.0
        moved = {
            name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in pixels.items()
        }
        return seconds(lambda: model.get_image_features(**moved), device)

    frozen = (Mode.FREEZE_VISUAL,) * len(decoder.layers)
    half = len(decoder.layers) // 2
    variants: list[tuple[Executor | None, Sequence[Mode]]] = [
        (None, modes),
        (executing, modes),
        (executing, frozen),
        (None, modes[:half]),
        (executing, frozen[:half]),
        (reference, modes),
    ]
    with torch.inference_mode():
        peaks = [peak_bytes(lambda variant=variant: run(*variant), device) for variant in variants[:2]]  # type: ignore[misc]
        for variant in variants[2:]:
            run(*variant)
        run_tower()
        rounds = [[*(run(*variant) for variant in variants), run_tower()] for _ in range(pairs)]
    return rounds, peaks


def prefill_text(result: Prefill) -> str:
    """Format the times, their ratios to the full model, and what was measured of the device."""
    lines = [
        f"measured limits: {result.limits.flops / 1e9:.0f} GFLOP/s, {result.limits.bandwidth / 1e9:.1f} GB/s",
        f"{'':12}{'ms':>10}{'of full':>10}",
        f"{'full':12}{1e3 * result.full:>10.1f}{1:>10.3f}",
        f"{'fast':12}{1e3 * result.fast:>10.1f}{result.fast_ratio:>10.3f}",
        f"{'reference':12}{1e3 * result.reference:>10.1f}{result.reference / result.full:>10.3f}",
        f"{'roofline':12}{'':>10}{result.roofline_ratio:>10.3f}",
        f"{'FLOPs':12}{'':>10}{result.flops_ratio:>10.3f}",
        f"speed-up {1 / result.fast_ratio:.2f}, {result.roofline_ratio / result.fast_ratio:.0%} of the roofline's "
        f"{1 / result.roofline_ratio:.2f}; a frozen layer takes {result.layer_ratio:.3f} of a full one",
    ]
    if result.tower:
        lines.append(f"vision tower {1e3 * result.tower:.1f} ms; with it fast takes {result.tower_ratio:.3f} of full")
    if result.peak_full:
        lines.append(f"peak memory {result.peak_full / 2**30:.2f} GiB full, {result.peak_fast / 2**30:.2f} GiB fast")
    return "\n".join(lines)
