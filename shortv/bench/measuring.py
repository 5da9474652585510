"""How every benchmark measures: variants in turn on a synchronised clock, peak memory, and the limits of a device.

`torch.utils.benchmark.Timer` repeats one statement after warm-up runs of its own. The benchmarks here interleave
several statements, and some take seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from shortv.bench.rows import Row

Variant = TypeVar("Variant")
_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, with the device synchronised before and after."""
    _synchronise(device)
    start = time.perf_counter()
    action()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Timings(Generic[Variant]):
    """Seconds of several variants in each round, and the peak memory of their warm-up run."""

    rounds: Sequence[Mapping[Variant, float]]
    peaks: Mapping[Variant, int]
    """Bytes of torch's allocator (CUDA; 0 elsewhere)."""

    @classmethod
    def interleaved(
        cls, variants: Mapping[Variant, Callable[[], float]], *, rounds: int, device: torch.device
    ) -> Timings[Variant]:
        """Run all variants once to warm up, then in turn: a busy moment of the machine hits all of them alike."""
        peaks = {}
        for name, run in variants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            run()
            peaks[name] = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
        return cls([{name: run() for name, run in variants.items()} for _ in range(rounds)], peaks)

    def median(self, variant: Variant) -> float:
        """Median seconds of a variant."""
        return statistics.median(found[variant] for found in self.rounds)

    def ratio(self, variant: Variant, baseline: Variant, *, beside: Variant | None = None) -> float:
        """Median of a variant's time over the baseline's in the same round, with a third one's on both sides."""
        more = [0.0 if beside is None else found[beside] for found in self.rounds]
        return statistics.median(
            (found[variant] + added) / (found[baseline] + added) for found, added in zip(self.rounds, more, strict=True)
        )

    def row(self, case: str, variant: Variant, baseline: Variant, **figures: float) -> Row:
        """One variant against the baseline."""
        return Row(
            case=case,
            baseline_ms=1e3 * self.median(baseline),
            measured_ms=1e3 * self.median(variant),
            ratio=self.ratio(variant, baseline),
            figures=figures,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Measured peak of a device: FLOP per second and bytes per second."""

    flops: float
    bandwidth: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measure the rate of one large matrix product and of one large copy (reads and writes both count)."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return DeviceLimits(flops=product_rate(device, dtype), bandwidth=2 * source.numel() / copy)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP per second of a large square matrix product."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: torch.mm(left, right), device)


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    action()
    return min(seconds(action, device) for _ in range(7))
