"""Measured memory and time of a sweep against what `shortv.costs` predicts.

A new process sweeps a batch of random prompts through a model with random weights. On a CPU, memory is the growth of
the process as Linux counts it; on a GPU, what torch's allocator hands out.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shortv.bench.device import product_rate, seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.bench.tables import MODES
from shortv.costs import STACK_SHARE, SweepMemory, activation_bytes, decoder_parameters, sweep_flops, sweep_memory
from shortv.errors import Refused
from shortv.families import Batch, LoadedModel, wrap
from shortv.families.preprocessing import positions_of
from shortv.families.tokens import token_types
from shortv.sweep.ablations import CPU_BUDGET, automatic_stack
from shortv.sweep.engine import measure

PADDING: Final = 8
"""Padding tokens of every sample but the first, so that the batch needs a mask, as real batches do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A published model cut to `layers` layers, and a batch whose longest prompt has t + v tokens.

    `stack` ablations run together; None lets the engine choose.
    """

    shape: str
    layers: int
    batch: int
    text_tokens: int
    visual_tokens: int
    stack: int | None = None
    repeats: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt."""
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Predicted and measured: bytes on the device, seconds per batch."""

    memory: SweepMemory
    """Predicted."""
    stack: int
    """Ablations that ran together."""
    weights: int
    """Bytes in use after loading the model."""
    work: int
    """Peak bytes of the sweep on top of the weights."""
    flops: float
    """Predicted for the sweep of one batch."""
    rate: float
    """Measured FLOP per second of one large matrix product."""
    seconds: float
    """Seconds of the fastest sweep of the batch."""

    @property
    def predicted_seconds(self) -> float:
        """Seconds of the batch if everything ran at the rate of the large product."""
        return self.flops / self.rate


def bench_sizing(case: Case) -> Sizing:
    """Sweep one batch in a new process; raises Refused where the memory of a process cannot be read."""
    published(case.shape)
    if torch.device(case.device).type == "cpu" and not _STATUS.exists():
        raise Refused(f"the memory of a process is read from {_STATUS}, which is not there; use Linux or a GPU")
    # A new interpreter, so that nothing the caller has loaded or freed counts.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, case).result()


def _measured(case: Case) -> Sizing:
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    # Both also load libraries and start threads, whose memory is not the model's.
    published(case.shape).parameters()
    rates = [product_rate(device, dtype)]
    before = _occupied(device)
    loaded = _loaded(random_model(case.shape, layers=case.layers, dtype=dtype, device=device), case.shape)
    weights = _occupied(device) - before
    batch, layers = _random_batch(loaded, case), range(case.layers)
    stack = min(case.stack or automatic_stack(loaded, case.batch, case.tokens), len(MODES) * case.layers)
    _forget_peak(device)
    times = [seconds(lambda: measure(loaded, batch, layers=layers, modes=MODES, stack=stack), device)]
    work = _peak(device) - before - weights
    # Interleaved, because other processes may use the machine: the fastest of each is what it can do.
    for _ in range(case.repeats - 1):
        rates.append(product_rate(device, dtype))
        times.append(seconds(lambda: measure(loaded, batch, layers=layers, modes=MODES, stack=stack), device))
    rates.append(product_rate(device, dtype))
    return Sizing(
        memory=_predicted_memory(loaded, case),
        stack=stack,
        weights=weights,
        work=work,
        flops=case.batch * sweep_flops(loaded.architecture, MODES, case.text_tokens, case.visual_tokens),
        rate=max(rates),
        seconds=min(times),
    )


def _predicted_memory(loaded: LoadedModel, case: Case) -> SweepMemory:
    """Predict for a device with room for `case.stack` ablations, or for this device when that is None."""
    arch, itemsize = loaded.architecture, int(loaded.model.dtype.itemsize)
    if case.stack:
        room = case.stack * activation_bytes(arch, case.batch * case.tokens, itemsize)
    elif loaded.device.type == "cuda":
        room = int(STACK_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    else:
        room = CPU_BUDGET
    return sweep_memory(
        arch,
        tokens=case.tokens,
        batch=case.batch,
        itemsize=itemsize,
        ablations=len(MODES) * case.layers,
        device_bytes=round(room / STACK_SHARE),
        other_parameters=sum(weight.numel() for weight in loaded.model.parameters()) - decoder_parameters(arch),
    )


def _loaded(model: Any, name: str) -> LoadedModel:
    return wrap(model, name=name)


def _random_batch(loaded: LoadedModel, case: Case) -> Batch:
    inputs = image_prompt(
        loaded.model, batch=case.batch, text_tokens=case.text_tokens, visual_tokens=case.visual_tokens
    )
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    padding = min(PADDING, case.text_tokens - 1)
    ids_BT[1:, :padding] = 0
    mask_BT[1:, :padding] = 0
    if loaded.decoder.family.positions_from_mask:
        inputs["position_ids"] = positions_of(mask_BT)
    return Batch(inputs=inputs, types=token_types(ids_BT, mask_BT, loaded.decoder.visual_ids)).on(loaded)


_STATUS: Final = Path("/proc/self/status")
_FORGET: Final = Path("/proc/self/clear_refs")


def _occupied(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _FORGET.write_text("5")


def _status(name: str) -> int:
    """Read a size in bytes. `resource.getrusage` would also report the peak of the parent process."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def sizing_text(result: Sizing, case: Case) -> str:
    """Format predictions beside measurements; `work` is the sweep's peak on top of the weights."""
    memory, gib = result.memory, 2**30
    rows = {
        "weights, GiB": (memory.weights / gib, result.weights / gib),
        "work of the sweep, GiB": ((memory.total - memory.weights) / gib, result.work / gib),
        "in all, GiB": (memory.total / gib, (result.weights + result.work) / gib),
        "seconds": (result.predicted_seconds, result.seconds),
    }
    lines = [
        f"{case.shape}, {case.layers} layers, batch {case.batch}, t = {case.text_tokens}, v = {case.visual_tokens}, "
        f"{case.dtype} on {case.device}",
        f"stacked ablations: {memory.stack} predicted, {result.stack} run; {result.flops / 1e12:.2f} TFLOP "
        f"at the measured {result.rate / 1e9:.0f} GFLOP/s",
        f"{'':24}{'predicted':>11}{'measured':>11}{'of predicted':>14}",
    ]
    for name, (predicted, measured) in rows.items():
        lines.append(f"{name:24}{predicted:>11.3f}{measured:>11.3f}{measured / predicted:>14.2f}")
    return "\n".join(lines)
