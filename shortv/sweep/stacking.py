"""Run ablations stacked along the batch axis: each layer's weights are read once for all that are under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shortv.families import Decoder, LoadedModel
from shortv.sweep.clean import last_logits
from shortv.sweep.lanes import Ablation, Lane
from shortv.sweep.passes import PassCounter

CPU_BUDGET = 256 * 2**20
GPU_SHARE = 0.25


def run_stack(decoder: Decoder, lane: Lane, stack: Sequence[Ablation], passes: PassCounter) -> list[Tensor]:
    """Logits (B, V) of each ablation, all advanced together; an ablation joins at the first layer it has to run."""
    batch = len(lane.last_B)
    order = sorted(range(len(stack)), key=lambda number: lane.first(stack[number]))
    waiting = [stack[number] for number in order]
    running: list[Tensor] = []
    for index in range(lane.first(waiting[0]), len(decoder.layers) + 1):
        while waiting and lane.first(waiting[0]) == index:
            running.append(lane.start(waiting.pop(0)))
        if index == len(decoder.layers):
            break
        hidden_NTD = running[0] if len(running) == 1 else torch.cat([state.to(running[0].device) for state in running])
        stacked = len(hidden_NTD) // batch
        arguments = repeat_batch(lane.arguments(index), stacked, batch)
        hidden_NTD = decoder.layers[index](hidden_NTD, **arguments)
        added_BTD = lane.after(index)
        running = [hidden_NTD if added_BTD is None else hidden_NTD + repeat_batch(added_BTD, stacked, batch)]
        lane.count(passes, stacked)
    states = [state_BTD for state in running for state_BTD in torch.split(state, batch)]
    logits: list[Tensor] = [torch.empty(0)] * len(stack)
    for number, state_BTD in zip(order, states, strict=True):
        logits[number] = last_logits(decoder, state_BTD, lane.last_B)
    return logits


def repeat_batch(value: Any, times: int, batch: int) -> Any:
    """Repeat everything that has one entry per sample; what is shared by the batch stays and broadcasts."""
    if isinstance(value, dict):
        return {name: repeat_batch(item, times, batch) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(repeat_batch(item, times, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch and batch > 1 and times > 1:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


def automatic_stack(loaded: LoadedModel, batch: int, length: int) -> int:
    """How many ablations fit the memory set aside for them.

    A fixed share of the device, not of what happens to be free: the same command stacks the same way every time.
    """
    architecture = loaded.architecture
    itemsize = int(loaded.model.dtype.itemsize)
    widths = 6 * architecture.hidden_size + 3 * architecture.intermediate_size
    scores = length * architecture.num_heads if loaded.model.config._attn_implementation == "eager" else 0
    needed = batch * length * (widths * itemsize + scores * (itemsize + 4))
    if loaded.device.type == "cuda":
        budget = int(GPU_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    else:
        budget = CPU_BUDGET
    return max(1, budget // needed)


@contextmanager
def allocation_failures() -> Iterator[None]:
    """Give a failed CPU allocation, a plain RuntimeError in torch, the type that a GPU's has."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "allocate" in str(error) and "memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
