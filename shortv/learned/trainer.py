"""What the training loop drives: a trainer of one kind of parts, and what all trainers share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shortv.errors import Refused, ShortVError
from shortv.families.parts import Learned, Parts
from shortv.plan import Mode
from shortv.sample import Sample

Executing = Callable[[Any, Sequence[Mode], Learned | None], AbstractContextManager[None]]
"""Runs a model under modes and learned parts while a block lasts: `shortv.layers.apply.executing`."""
Reduce = Callable[[Iterable[nn.Parameter]], None]
"""Averages the gradients of parameters over the workers, in place; every worker calls it with the same parameters."""

WEIGHT = "weight"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for a parameter."""


class Trainer(Protocol):
    """Trains one kind of parts, a step at a time. What a step draws at random depends on seed and step alone."""

    steps: int
    batch_size: int
    """Samples of a step, over all workers."""

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step, counted from 0, on this worker's share of the batch.

        Returns:
            Metrics of the step: `loss`, and others by name. A loss that is not finite ends the training.

        Raises:
            SampleError: a sample cannot be used; raised before anything is changed, so the step can be taken again.
        """
        ...

    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample, whatever it is batched with."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Trained weights and optimizer, and all else that the next step depends on: flat, for safetensors."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises ShortVError when it does not fit."""
        ...

    def parts(self) -> Parts:
        """The parts as trained so far: what is saved at the end."""
        ...


def alone(_: Iterable[nn.Parameter]) -> None:
    """The Reduce of a single worker: its gradients are the gradients."""


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int = 0, last: float = 0.01) -> float:
    """Give the rate of a step: a linear warm-up to `peak`, then a cosine down to `last` of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))


def check_rates(rates: Mapping[str, float]) -> None:
    """Raise Refused for a learning rate, named by its option, that cannot be meant."""
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise Refused(f"{name} is {rate:g}; give a learning rate above 0 and at most 1")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all of an optimizer's parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw new weights from a seed; torch's own generators of the CPU and that device are then as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """A CPU random generator that depends on its arguments alone, so that a resumed run draws the same."""
    # The text of a tuple is the same in every process, unlike its hash.
    digest = hashlib.sha256(repr((seed, step, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def flat_state(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW moments as flat tensors, `weight/NAME`, `exp_avg/NAME`, ..., copied to the CPU."""
    tensors = {}
    for name, parameter in named.items():
        tensors[f"{WEIGHT}/{name}"] = _copy(parameter)
        # A parameter that had no gradient so far has no moments: its count of steps starts later.
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{entry}/{name}"] = _copy(tensor)
    return tensors


def restore_flat_state(
    state: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `flat_state` returned.

    Raises:
        ShortVError: a weight is missing or has another shape.
    """
    for name, parameter in named.items():
        found = state.get(f"{WEIGHT}/{name}")
        if found is None or found.shape != parameter.shape:
            shape = None if found is None else tuple(found.shape)
            raise ShortVError(
                f"the checkpoint has {name} with shape {shape}, the trained parts {tuple(parameter.shape)}; "
                "train into another folder"
            )
        with torch.no_grad():
            parameter.copy_(found)
        moments = {entry: state[f"{entry}/{name}"] for entry in MOMENTS if f"{entry}/{name}" in state}
        if moments:
            # AdamW counts steps on the CPU, unless it is fused on a GPU; both take the count from there.
            optimizer.state[parameter] = {
                entry: tensor.clone() if entry == "step" else tensor.to(parameter.device, parameter.dtype, copy=True)
                for entry, tensor in moments.items()
            }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
