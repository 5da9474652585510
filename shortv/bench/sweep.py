"""Speed of the sweep engine against ShortV's released algorithm, which runs one whole forward per layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortv.bench.device import seconds
from shortv.errors import Refused
from shortv.families import Batch, Decoder, LoadedModel, encode
from shortv.plan import Mode
from shortv.sample import Sample
from shortv.sweep.ablations import last_logits
from shortv.sweep.divergence import Divergence, divergence, log_probabilities
from shortv.sweep.engine import measure

Engine = Callable[[Batch], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One variant of a sweep over all samples."""

    name: str
    batch_size: int
    layer_passes: int
    """Layer runs counted by hooks, per sample: a layer run over a stack of k batches of B samples counts k B."""
    seconds: float
    """Median over the repeats."""


def bench_sweep(loaded: LoadedModel, samples: Sequence[Sample], *, batch_size: int, repeats: int) -> list[BenchRow]:
    """Time a sweep of `freeze-visual` by every variant, interleaved `repeats` times.

    Samples are encoded beforehand, once for all variants. Raises Refused when a sample cannot be encoded.
    """
    single, batched = _batches(loaded, samples, 1), _batches(loaded, samples, batch_size)
    layers = range(len(loaded.decoder.layers))

    def released(batch: Batch) -> object:
        return measure_released(loaded, batch)

    def unstacked(batch: Batch) -> object:
        return measure(loaded, batch, layers=layers, modes=[Mode.FREEZE_VISUAL], stack=1)

    def stacked(batch: Batch) -> object:
        return measure(loaded, batch, layers=layers, modes=[Mode.FREEZE_VISUAL])

    variants: list[tuple[str, int, Engine, list[Batch]]] = [
        ("released algorithm", 1, released, single),
        ("released algorithm", batch_size, released, batched),
        ("this engine, unstacked", batch_size, unstacked, batched),
        ("this engine", 1, stacked, single),
        ("this engine", batch_size, stacked, batched),
    ]
    passes = [_layer_passes(loaded, engine, batches) for _, _, engine, batches in variants]  # also warms up

    def run(engine: Engine, batches: Sequence[Batch]) -> None:
        for batch in batches:
            engine(batch)

    rounds = [
        [seconds(partial(run, engine, batches), loaded.device) for _, _, engine, batches in variants]
        for _ in range(repeats)
    ]
    return [
        BenchRow(name=name, batch_size=size, layer_passes=count, seconds=statistics.median(times))
        for (name, size, _, _), count, times in zip(variants, passes, zip(*rounds, strict=True), strict=True)
    ]


@torch.inference_mode()
def measure_released(loaded: LoadedModel, batch: Batch) -> list[Divergence]:
    """LC of visual tokens per layer from L + 1 forwards of the whole model, vision tower included.

    The released code takes the softmax in the model's dtype and assumes that the image starts at token 35. Here both
    are corrected, so that only the amount of work differs from `measure`.
    """
    full_BV = log_probabilities(_forward(loaded, batch))
    values = []
    for layer in loaded.decoder.layers:
        with _silenced(loaded.decoder, layer, batch.types.visual_BT[:, :, None]):
            values.append(divergence(full_BV, log_probabilities(_forward(loaded, batch))))
    return values


def _forward(loaded: LoadedModel, batch: Batch) -> Tensor:
    left: list[Tensor] = []
    handle = loaded.decoder.layers[-1].register_forward_hook(lambda _, __, output: left.append(output))
    try:
        loaded.decoder.backbone(**batch.inputs, use_cache=False)
    finally:
        handle.remove()
    return last_logits(loaded.decoder, left[0], batch.types.last_B)


@contextmanager
def _silenced(decoder: Decoder, layer: nn.Module, visual_BT1: Tensor) -> Iterator[None]:
    """Zero both halves' outputs at visual positions before they are added to the residual stream."""

    def silence(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].masked_fill(visual_BT1, 0), *output[1:])
        return output.masked_fill(visual_BT1, 0)

    handles = [part.register_forward_hook(silence) for part in (decoder.attention(layer), decoder.ffn(layer))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(loaded: LoadedModel, samples: Sequence[Sample], size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(samples), size):
        encoded = encode(loaded, samples[start : start + size])
        if encoded.errors or encoded.batch is None:
            sample, error = encoded.errors[0]
            raise Refused(f"sample {sample.sample_id!r} cannot be used: {error}; bench on samples that all can")
        batches.append(encoded.batch)
    return batches


def _layer_passes(loaded: LoadedModel, engine: Engine, batches: Sequence[Batch]) -> int:
    with _counting(loaded) as count:
        for batch in batches:
            engine(batch)
    return count[0]


@contextmanager
def _counting(loaded: LoadedModel) -> Iterator[list[int]]:
    count = [0]

    def hook(_: Any, __: Any, output_NTD: torch.Tensor) -> None:
        count[0] += len(output_NTD)

    handles = [layer.register_forward_hook(hook) for layer in loaded.decoder.layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def sweep_text(rows: Sequence[BenchRow]) -> str:
    """Format the rows with their ratios to the released algorithm, at batch 1 and at the same batch size."""
    released = {row.batch_size: row for row in rows if row.name == "released algorithm"}
    lines = [f"{'':26}{'batch':>6}{'layer passes':>14}{'seconds':>9}{'x batch 1':>11}{'x same batch':>14}"]
    for row in rows:
        alone, same = released[1].seconds / row.seconds, released[row.batch_size].seconds / row.seconds
        lines.append(
            f"{row.name:26}{row.batch_size:>6}{row.layer_passes:>14}{row.seconds:>9.2f}{alone:>11.2f}{same:>14.2f}"
        )
    return "\n".join(lines)
