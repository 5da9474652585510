"""Time, peak memory and measured limits of a device.

`torch.utils.benchmark.Timer` repeats one statement after warm-up runs of its own. The benchmarks here interleave
several statements, and some take seconds, so they use the synchronised clock below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Measured peak of a device: FLOP per second and bytes per second."""

    flops: float
    bandwidth: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measure the rate of one large matrix product and of one large copy (reads and writes both count)."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = fastest(lambda: target.copy_(source), device)
    return DeviceLimits(flops=product_rate(device, dtype), bandwidth=2 * source.numel() / copy)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP per second of a large square matrix product."""
    side = _SIDE[device.type]
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / fastest(lambda: torch.mm(left, right), device)


def fastest(action: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Seconds of the fastest of several runs, after one warm-up run."""
    action()
    return min(seconds(action, device) for _ in range(repeats))


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, with the device synchronised before and after."""
    _synchronise(device)
    start = time.perf_counter()
    action()
    _synchronise(device)
    return time.perf_counter() - start


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Run `action` and return the peak of torch's allocator in bytes (CUDA; 0 elsewhere)."""
    if device.type != "cuda":
        action()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return int(torch.cuda.max_memory_allocated(device))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
