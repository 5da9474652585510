"""Speed of the sweep engine against the released algorithm: same model, same samples, one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from shortv.errors import Refused
from shortv.families import Batch, LoadedModel, encode
from shortv.plan import Mode
from shortv.sample import Sample
from shortv.sweep.engine import measure
from shortv.sweep.released import measure_released

Engine = Callable[[Batch], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One way of sweeping all samples."""

    name: str
    batch_size: int
    layer_passes: int
    """Layer runs counted by hooks, per sample: a layer run over a stack of k batches of B samples counts k B."""
    seconds: float
    """Median over the repeats."""


def bench_sweep(loaded: LoadedModel, samples: Sequence[Sample], *, batch_size: int, repeats: int) -> list[BenchRow]:
    """Sweep `freeze-visual` over all samples in every way, interleaved `repeats` times.

    Encoding is done beforehand and is the same for all. Raises Refused when a sample cannot be encoded.
    """
    single, batched = _batches(loaded, samples, 1), _batches(loaded, samples, batch_size)
    layers = range(len(loaded.decoder.layers))

    def released(batch: Batch) -> object:
        return measure_released(loaded, batch)

    def unstacked(batch: Batch) -> object:
        return measure(loaded, batch, layers=layers, modes=[Mode.FREEZE_VISUAL], stack=1)

    def stacked(batch: Batch) -> object:
        return measure(loaded, batch, layers=layers, modes=[Mode.FREEZE_VISUAL])

    ways: list[tuple[str, int, Engine, list[Batch]]] = [
        ("released algorithm", 1, released, single),
        ("released algorithm", batch_size, released, batched),
        ("this engine, unstacked", batch_size, unstacked, batched),
        ("this engine", 1, stacked, single),
        ("this engine", batch_size, stacked, batched),
    ]
    passes = [_layer_passes(loaded, engine, batches) for _, _, engine, batches in ways]  # also warms up
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for times, (_, _, engine, batches) in zip(seconds, ways, strict=True):
            times.append(_seconds(loaded, engine, batches))
    return [
        BenchRow(name=name, batch_size=size, layer_passes=count, seconds=statistics.median(times))
        for (name, size, _, _), count, times in zip(ways, passes, seconds, strict=True)
    ]


def _batches(loaded: LoadedModel, samples: Sequence[Sample], size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(samples), size):
        encoded = encode(loaded, samples[start : start + size])
        if encoded.errors or encoded.batch is None:
            sample, error = encoded.errors[0]
            raise Refused(f"sample {sample.sample_id!r} cannot be used: {error}; bench on samples that all can")
        batches.append(encoded.batch)
    return batches


def _seconds(loaded: LoadedModel, engine: Engine, batches: Sequence[Batch]) -> float:
    _synchronise(loaded)
    start = time.perf_counter()
    for batch in batches:
        engine(batch)
    _synchronise(loaded)
    return time.perf_counter() - start


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


def _synchronise(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
