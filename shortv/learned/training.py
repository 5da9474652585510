"""What the trainers of all learned systems share; nothing here knows Ray.

A training is deterministic: what a step draws at random depends on seed and step alone, so a resumed training computes
the same weights bit for bit. Shapes: B batch, T positions, N answer tokens of all samples, V vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from shortv.errors import ShortVError
from shortv.families import LoadedModel
from shortv.families.supervised import IGNORED, Supervised
from shortv.learned.base import Parts
from shortv.learned.system import Reduce
from shortv.sample import Sample

_WEIGHT = "weight"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW stores for a parameter."""
P = TypeVar("P", bound=Parts)


class Trainer(ABC, Generic[P]):
    """Trains one kind of parts, a step at a time; the model itself is not changed."""

    _parts: P
    _optimizer: torch.optim.Optimizer

    def __init__(self, loaded: LoadedModel, recipe: Any, reduce: Reduce) -> None:
        self.steps: int = recipe.steps
        self.batch_size: int = recipe.batch_size
        """Samples of a step, over all workers."""
        self._loaded, self._reduce = loaded, reduce

    @abstractmethod
    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step, counted from 0, on this worker's share of the batch.

        Returns:
            Metrics of the step: `loss`, and others by name. A loss that is not finite ends the training.

        Raises:
            SampleError: a sample cannot be used; nothing was changed, so the step can be taken again without it.
        """

    @abstractmethod
    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample, whatever it is batched with."""

    def state(self) -> dict[str, Tensor]:
        """Return trained weights, optimizer and all else that the next step depends on: flat, on the CPU."""
        return flat_state(dict(self._parts.named_parameters()), self._optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned. Raises ShortVError when it does not fit."""
        restore_flat_state(state, dict(self._parts.named_parameters()), self._optimizer)

    def parts(self) -> P:
        """Return the parts as trained so far, which are saved at the end."""
        return self._parts


def alone(_: Iterable[nn.Parameter]) -> None:
    """Reduce for a single worker: its gradients are already the average."""


def answer_logits(loaded: LoadedModel, given: Supervised) -> tuple[Tensor, Tensor]:
    """Run the model and compute logits only where they predict a labelled token.

    Returns:
        Logits (N, V) and the labels (N) that they predict, sample by sample.
    """
    labels_BT = given.labels_BT[:, 1:]
    predicts_BT = nn.functional.pad(labels_BT != IGNORED, (0, 1))

    def select(_: nn.Module, args: tuple[Any, ...]) -> Tensor:
        # The head sees these rows alone: the vocabulary is the largest dimension of a training step.
        hidden_BTD: Tensor = args[0]
        return hidden_BTD[predicts_BT.to(hidden_BTD.device)]

    handle = loaded.decoder.head.register_forward_pre_hook(select)
    try:
        logits_NV: Tensor = loaded.model(**given.batch.inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits_NV, labels_BT[labels_BT != IGNORED].to(logits_NV.device)


def adamw(parts: nn.Module, *, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the parts' weights, with weight decay on matrices only."""
    weights = list(parts.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all of an optimizer's parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw new weights from a seed; torch's generators of the CPU and of `device` are restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """Return a CPU random generator that depends on its arguments alone, so that a resumed run draws the same."""
    # The text of a tuple is the same in every process, unlike its hash.
    digest = hashlib.sha256(repr((seed, step, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def flat_state(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and AdamW moments as flat tensors, `weight/NAME`, `exp_avg/NAME`, ..., copied to the CPU."""
    tensors = {}
    for name, parameter in named.items():
        tensors[f"{_WEIGHT}/{name}"] = _copy(parameter)
        # A parameter that had no gradient so far has no moments: its count of steps starts later.
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{entry}/{name}"] = _copy(tensor)
    return tensors


def restore_flat_state(
    state: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Restore what `flat_state` returned. Raises ShortVError for a weight that is missing or has another shape."""
    for name, parameter in named.items():
        found = state.get(f"{_WEIGHT}/{name}")
        if found is None or found.shape != parameter.shape:
            shape = None if found is None else tuple(found.shape)
            raise ShortVError(
                f"the checkpoint has {name} with shape {shape}, the trained parts {tuple(parameter.shape)}; "
                "train into another folder"
            )
        with torch.no_grad():
            parameter.copy_(found)
        moments = {entry: state[f"{entry}/{name}"] for entry in _MOMENTS if f"{entry}/{name}" in state}
        if moments:
            # AdamW counts steps on the CPU, unless it is fused on a GPU; both take the count from there.
            optimizer.state[parameter] = {
                entry: tensor.clone() if entry == "step" else tensor.to(parameter.device, parameter.dtype, copy=True)
                for entry, tensor in moments.items()
            }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
