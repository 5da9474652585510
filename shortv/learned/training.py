"""What the trainers of all learned systems share; nothing here knows Ray.

A training is deterministic: what a step draws at random depends on seed and step alone, so a resumed training computes
the same weights bit for bit. Shapes: B batch, T positions, N answer tokens of all samples, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from shortv.errors import ShortVError
from shortv.families import LoadedModel
from shortv.families.supervised import IGNORED, Supervised, supervised
from shortv.learned.base import Parts
from shortv.learned.system import Reduce, alone
from shortv.sample import Sample

_WEIGHT = "weight"
P = TypeVar("P", bound=Parts)


class Trainer(ABC, Generic[P]):
    """Trains one kind of parts, a step at a time; the model itself is not changed."""

    parts_class: ClassVar[type[Parts]]
    padding_side: ClassVar[Literal["left", "right"] | None] = "left"
    """Where batches are padded; None for the tokenizer's own side."""
    _parts: P
    _optimizer: torch.optim.Optimizer

    def __init__(self, loaded: LoadedModel, recipe: Any, reduce: Reduce = alone) -> None:
        """Take what is trained. Subclasses build the parts, and raise Refused for a model that cannot have them."""
        self.steps: int = recipe.steps
        self.batch_size: int = recipe.batch_size
        """Samples of a step, over all workers."""
        self._loaded, self._recipe, self._reduce = loaded, recipe, reduce

    @abstractmethod
    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step, counted from 0, on this worker's share of the batch.

        Returns:
            Metrics of the step: `loss`, and others by name. A loss that is not finite ends the training.

        Raises:
            SampleError: a sample cannot be used; nothing was changed, so the step can be taken again without it.
        """

    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample, whatever it is batched with."""
        self.encoded([sample])

    def encoded(self, samples: Sequence[Sample]) -> Supervised:
        """Encode samples with the answers that they are trained on. Raises SampleError."""
        return supervised(self._loaded, samples, padding_side=self.padding_side)

    def parts(self) -> P:
        """Return the parts as trained so far, which are saved at the end."""
        return self._parts

    def _begin(self, settings: Any) -> None:
        """Build fresh parts from the recipe's seed, and AdamW over them, with weight decay on matrices only."""
        loaded, recipe = self._loaded, self._recipe
        with torch.random.fork_rng([loaded.device] if loaded.device.type == "cuda" else []):
            torch.manual_seed(recipe.seed)
            parts: Any = self.parts_class.build(loaded.decoder, settings)
        parts.place(loaded.decoder)
        weights = list(parts.parameters())
        groups = [
            {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ]
        self._parts, self._optimizer = parts, torch.optim.AdamW(groups)

    def _backward(self, loss: Tensor, weights: Sequence[nn.Parameter]) -> None:
        """Compute the gradients of these weights, averaged over the workers."""
        self._optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self._reduce(weights)

    def _update(self, weights: Sequence[nn.Parameter], rate: float, *, gradient_norm: float = math.inf) -> float:
        """Step with gradients clipped to a norm, unless that is not finite; returns the norm before clipping.

        It is the same on all workers, so that they stop together.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = float(torch.nn.utils.clip_grad_norm_(weights, gradient_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on: `weight/NAME`, `exp_avg/NUMBER`, ..., flat, copied to the CPU."""
        state = {f"{_WEIGHT}/{name}": weight for name, weight in self._parts.state_dict().items()}
        # A parameter that had no gradient so far has no moments: its count of steps starts later.
        for number, moments in self._optimizer.state_dict()["state"].items():
            state |= {f"{name}/{number}": moment for name, moment in moments.items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned. Raises ShortVError when it does not fit."""
        weights: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            if kind == _WEIGHT:
                weights[rest] = tensor
            elif rest.isdecimal():
                moments.setdefault(int(rest), {})[kind] = tensor.clone()
        try:
            self._parts.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ShortVError(
                f"the checkpoint does not fit the trained parts: {reason}; train into another folder"
            ) from error
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


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


def generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """Return a CPU random generator that depends on its arguments alone, so that a resumed run draws the same."""
    # The text of a tuple is the same in every process, unlike its hash.
    digest = hashlib.sha256(repr((seed, step, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
