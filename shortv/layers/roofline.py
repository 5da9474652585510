"""The least time a prefill can take on this device: each matrix product at peak FLOP rate or at full bandwidth.

Both limits are measured on the spot, by one large product and one large copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from shortv.architecture import Architecture
from shortv.costs import count_of
from shortv.plan import WORK, Mode

_SIDE = {"cuda": 8192, "cpu": 3072}
_COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device can do: FLOP per second and bytes per second, measured."""

    flops: float
    bandwidth: float


def measure_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Measure peak matrix FLOP rate and memory bandwidth (reads and writes both count)."""
    side = _SIDE[device.type]
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    product = fastest(lambda: torch.mm(left, right), device)
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = fastest(lambda: target.copy_(source), device)
    return Device(flops=2 * side**3 / product, bandwidth=2 * source.numel() / copy)


def roofline_seconds(
    architecture: Architecture, modes: Sequence[Mode], *, batch: int, t: int, v: int, itemsize: int, device: Device
) -> float:
    """Seconds that the matrix products of all layers need at least; norms, softmax and copies are left out."""
    return sum(
        max(2 * rows * inner * columns * count / device.flops, moved * itemsize / device.bandwidth)
        for mode in modes
        for rows, inner, columns, count, moved in _products(architecture, mode, batch, t, v)
    )


def _products(
    architecture: Architecture, mode: Mode, batch: int, t: int, v: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, inner size, columns, how many, and elements moved, of each product of one layer."""
    work, hidden = WORK[mode], architecture.hidden_size
    query_width = architecture.num_heads * architecture.head_dim
    key_width = architecture.num_kv_heads * architecture.head_dim
    queries, keys, ffn = (count_of(tokens, t, v) for tokens in work)

    def linear(tokens: int, inner: int, columns: int, count: int) -> tuple[int, int, int, int, int]:
        rows = batch * tokens
        return rows, inner, columns, count, count * (rows * inner + inner * columns + rows * columns) if rows else 0

    yield linear(queries, hidden, query_width, 1)
    yield linear(keys, hidden, key_width, 2)
    yield linear(queries, query_width, hidden, 1)
    yield linear(ffn, hidden, architecture.intermediate_size, 2)
    yield linear(ffn, architecture.intermediate_size, hidden, 1)
    # Scores stay on the chip in a fused kernel: queries, keys, values and outputs are what moves.
    moved = batch * (2 * queries * query_width + 2 * keys * key_width)
    yield queries, query_width, keys, 2 * batch, moved if queries else 0


def fastest(action: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    action()
    return min(seconds(action, device) for _ in range(repeats))


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the device's queue drained before and after."""
    synchronise(device)
    start = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
