"""Prefill time of a model under a plan against the full model and the roofline, in interleaved pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shortv.architecture import Architecture
from shortv.bench.measuring import DeviceLimits, Timings, measure_limits, seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.bench.rows import GIB, Row
from shortv.bench.specs import PrefillBench
from shortv.costs import count_of, flops_ratio
from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.plan import WORK, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A batch of prompts with one image each; text and visual tokens are counted per prompt."""

    batch: int
    text_tokens: int
    visual_tokens: int


def bench(spec: PrefillBench) -> Iterator[Row]:
    """Build the model and time it; raises Refused when the shape does not have the layers."""
    known = published(spec.shape)
    depth = spec.layers or known.num_layers
    frozen = spec.frozen or max(1, round(depth * known.frozen / known.num_layers))
    visual_tokens = spec.visual_tokens or known.visual_tokens
    if depth > known.num_layers or frozen > depth:
        raise Refused(f"{frozen} frozen of {depth} layers cannot be: {spec.shape} has {known.num_layers}")
    model = random_model(spec.shape, layers=depth, dtype=getattr(torch, spec.dtype), device=torch.device(spec.device))
    modes = (Mode.FULL,) * (depth - frozen) + (Mode.FREEZE_VISUAL,) * frozen
    work = Workload(batch=spec.batch_size, text_tokens=spec.text_tokens, visual_tokens=visual_tokens)
    pixels = known.pixels(spec.batch_size, visual_tokens) if spec.vision_tower else None
    case = f"{spec.shown(depth, visual_tokens)}, {frozen} frozen"
    yield bench_prefill(model, modes, work, case=case, pairs=spec.pairs, pixels=pixels)


def bench_prefill(
    model: Any,
    modes: Sequence[Mode],
    work: Workload,
    *,
    case: str,
    pairs: int,
    pixels: Mapping[str, torch.Tensor] | None = None,
) -> Row:
    """Time full, fast and reference prefills of the decoder, and the vision tower on `pixels`, interleaved.

    A frozen layer's time over a full one's, `frozen_layer_ratio`, comes from the whole depth and half of it.
    """
    times = _measure(model, modes, work, pairs, pixels)
    architecture = Architecture.from_config_dict(model.config.to_dict())
    limits = measure_limits(model.device, model.dtype)
    roofline, roofline_full = (
        roofline_seconds(architecture, plan, work, itemsize=model.dtype.itemsize, limits=limits)
        for plan in (modes, (Mode.FULL,) * len(modes))
    )
    fast_ratio, roofline_ratio = times.ratio("fast", "full"), roofline / roofline_full
    frozen_layers = times.median("frozen") - times.median("half frozen")
    figures = {
        "reference_ms": 1e3 * times.median("reference"),
        "reference_ratio": times.ratio("reference", "full"),
        "flops_ratio": flops_ratio(architecture, modes, work.text_tokens, work.visual_tokens),
        "roofline_ratio": roofline_ratio,
        "of_roofline_speed_up": roofline_ratio / fast_ratio,
        "frozen_layer_ratio": frozen_layers / (times.median("full") - times.median("half")),
        "gflops_per_s": limits.flops / 1e9,
        "gb_per_s": limits.bandwidth / 1e9,
    }
    if pixels is not None:
        figures |= {
            "tower_ms": 1e3 * times.median("tower"),
            "ratio_with_tower": times.ratio("fast", "full", beside="tower"),
        }
    if times.peaks["full"]:
        figures |= {f"peak_gib_{name}": times.peaks[name] / GIB for name in ("full", "fast")}
    return times.row(case, "fast", "full", **figures)


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
    hidden, ffn_width = architecture.hidden_size, architecture.intermediate_size
    query_width = architecture.num_heads * architecture.head_dim
    key_width = architecture.num_kv_heads * architecture.head_dim
    queries, keys, ffn = (count_of(tokens, work.text_tokens, work.visual_tokens) for tokens in WORK[mode])
    for tokens, inner, columns, count in (
        (queries, hidden, query_width, 1),
        (keys, hidden, key_width, 2),
        (queries, query_width, hidden, 1),
        (ffn, hidden, ffn_width, 2),
        (ffn, ffn_width, hidden, 1),
    ):
        rows = work.batch * tokens
        yield rows, inner, columns, count, count * (rows * inner + inner * columns + rows * columns) if rows else 0
    # A fused kernel keeps the scores on the chip: queries, keys, values and outputs are what moves.
    moved = work.batch * (2 * queries * query_width + 2 * keys * key_width)
    yield queries, query_width, keys, 2 * work.batch, moved if queries else 0


def _measure(
    model: Any, modes: Sequence[Mode], work: Workload, pairs: int, pixels: Mapping[str, torch.Tensor] | None
) -> Timings[str]:
    decoder, device = decoder_of(model), model.device
    inputs = image_prompt(model, batch=work.batch, text_tokens=work.text_tokens, visual_tokens=work.visual_tokens)
    text: Any = decoder.text
    every = text.layers

    def run(executor: Any, modes: Sequence[Mode]) -> float:
        text.layers = every[: len(modes)]
        try:
            with executor(model, modes):
                return seconds(lambda: model(**inputs, logits_to_keep=1), device)
        finally:
            text.layers = every

    def tower() -> float:
        moved = {
            name: value.to(device, model.dtype if value.is_floating_point() else None)
            for name, value in (pixels or {}).items()
        }
        return seconds(lambda: model.get_image_features(**moved), device)

    frozen = (Mode.FREEZE_VISUAL,) * len(decoder.layers)
    half = len(decoder.layers) // 2
    variants: dict[str, Callable[[], float]] = {
        "full": partial(run, _untouched, modes),
        "fast": partial(run, executing, modes),
        "frozen": partial(run, executing, frozen),
        "half": partial(run, _untouched, modes[:half]),
        "half frozen": partial(run, executing, frozen[:half]),
        "reference": partial(run, reference, modes),
    }
    if pixels is not None:
        variants["tower"] = tower
    with torch.inference_mode():
        return Timings.interleaved(variants, rounds=pairs, device=device)


def _untouched(model: Any, modes: Sequence[Mode]) -> AbstractContextManager[None]:
    return nullcontext()
