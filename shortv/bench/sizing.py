"""Measured memory and time of a sweep against what `shortv.bench.tables` predicts.

A new process sweeps a batch of random prompts through a model with random weights. On a CPU, memory is the growth of
the process as Linux counts it; on a GPU, what torch's allocator hands out.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import torch

from shortv.bench.measuring import product_rate, seconds
from shortv.bench.models import image_prompt, published, random_model
from shortv.bench.rows import GIB, Row
from shortv.bench.specs import SizingBench
from shortv.bench.tables import MODES, SweepMemory, decoder_parameters, sweep_memory
from shortv.costs import STACK_SHARE, activation_bytes, sweep_flops
from shortv.errors import Refused
from shortv.families import Batch, LoadedModel, wrap
from shortv.families.preprocessing import positions_of
from shortv.families.tokens import token_types
from shortv.sweep.ablations import CPU_BUDGET, automatic_stack
from shortv.sweep.engine import measure

PADDING: Final = 8
"""Padding tokens of every sample but the first, so that the batch needs a mask, as real batches do."""
_STATUS: Final = Path("/proc/self/status")


def bench(spec: SizingBench) -> Iterator[Row]:
    """Sweep one batch in a new process; raises Refused where the memory of a process cannot be read."""
    published(spec.shape)
    if torch.device(spec.device).type == "cpu" and not _STATUS.exists():
        raise Refused(f"the memory of a process is read from {_STATUS}, which is not there; use Linux or a GPU")
    # A new interpreter, so that nothing the caller has loaded or freed counts.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.submit(_measured, spec).result()


def _measured(spec: SizingBench) -> Row:
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    # Both also load libraries and start threads, whose memory is not the model's.
    published(spec.shape).parameters()
    rates = [product_rate(device, dtype)]
    before = _occupied(device)
    loaded = wrap(random_model(spec.shape, layers=spec.layers, dtype=dtype, device=device), name=spec.shape)
    weights = _occupied(device) - before
    batch, layers = _random_batch(loaded, spec), range(spec.layers)
    tokens = spec.text_tokens + spec.visual_tokens
    stack = min(spec.stack or automatic_stack(loaded, spec.batch_size, tokens), len(MODES) * spec.layers)
    sweep = partial(measure, loaded, batch, layers=layers, modes=MODES, stack=stack)
    _forget_peak(device)
    times = [seconds(sweep, device)]
    work = _peak(device) - before - weights
    # Interleaved, because other processes may use the machine: the fastest of each is what it can do.
    for _ in range(spec.repeats - 1):
        rates.append(product_rate(device, dtype))
        times.append(seconds(sweep, device))
    rates.append(product_rate(device, dtype))
    memory = _predicted_memory(loaded, spec)
    flops = spec.batch_size * sweep_flops(loaded.architecture, MODES, spec.text_tokens, spec.visual_tokens)
    return Row(
        case=f"{spec.shown(spec.layers, spec.visual_tokens)}; predicted against measured",
        baseline_ms=1e3 * flops / max(rates),
        measured_ms=1e3 * min(times),
        ratio=min(times) * max(rates) / flops,
        figures={
            "predicted_weights_gib": memory.weights / GIB,
            "weights_gib": weights / GIB,
            "predicted_work_gib": (memory.total - memory.weights) / GIB,
            "work_gib": work / GIB,
            "predicted_gib": memory.total / GIB,
            "measured_gib": (weights + work) / GIB,
            "predicted_stack": memory.stack,
            "stack": stack,
            "tflop": flops / 1e12,
            "gflops_per_s": max(rates) / 1e9,
        },
    )


def _predicted_memory(loaded: LoadedModel, spec: SizingBench) -> SweepMemory:
    """Predict for a device with room for `spec.stack` ablations, or for this device when that is None."""
    arch, itemsize = loaded.architecture, int(loaded.model.dtype.itemsize)
    tokens = spec.text_tokens + spec.visual_tokens
    if spec.stack:
        room = spec.stack * activation_bytes(arch, spec.batch_size * tokens, itemsize)
    elif loaded.device.type == "cuda":
        room = int(STACK_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    else:
        room = CPU_BUDGET
    return sweep_memory(
        arch,
        tokens=tokens,
        batch=spec.batch_size,
        itemsize=itemsize,
        ablations=len(MODES) * spec.layers,
        device_bytes=round(room / STACK_SHARE),
        other_parameters=sum(weight.numel() for weight in loaded.model.parameters()) - decoder_parameters(arch),
    )


def _random_batch(loaded: LoadedModel, spec: SizingBench) -> Batch:
    inputs = image_prompt(
        loaded.model, batch=spec.batch_size, text_tokens=spec.text_tokens, visual_tokens=spec.visual_tokens
    )
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    padding = min(PADDING, spec.text_tokens - 1)
    ids_BT[1:, :padding] = 0
    mask_BT[1:, :padding] = 0
    if loaded.decoder.family.positions_from_mask:
        inputs["position_ids"] = positions_of(mask_BT)
    return Batch(inputs=inputs, types=token_types(ids_BT, mask_BT, loaded.decoder.visual_ids)).on(loaded)


def _occupied(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # What was freed goes back to the system; otherwise the model may reuse it and seem smaller than it is.
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Read a size in bytes. `resource.getrusage` would also report the peak of the parent process."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
