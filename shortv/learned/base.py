"""What the parts of all learned systems have in common, and how they run under a plan."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from shortv.architecture import Architecture
from shortv.families.decoder import Decoder
from shortv.layers.progress import LearnedRun, Progress
from shortv.plan import Mode, PartsKind


class Parts(nn.Module):
    """Learned parts of one model, built for its decoder from a few settings."""

    kind: ClassVar[PartsKind]
    settings: Any

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.digest: str | None = None
        """SHA-256 of weights and settings on disk; None for parts that were never saved or are in training."""
        self._unsaved = uuid4().hex

    @classmethod
    def build(cls, decoder: Decoder, settings: Any) -> Self:
        """Make parts with fresh weights in float32. Raises Refused where the family cannot have them."""
        raise NotImplementedError

    def place(self, decoder: Decoder) -> None:
        """Move each module to the device that it runs on."""
        raise NotImplementedError

    def lower(self, dtype: torch.dtype) -> None:
        """Convert the weights to a dtype, and those of deciding layers to float32."""
        for module in self.modules():
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(torch.float32 if isinstance(module, DecidingLinear) else dtype)

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """Return what a plan's source needs so that the FLOPs of the parts can be counted."""
        return {}

    @property
    def identity(self) -> str:
        """What names the weights: the digest, or for unsaved parts a name that no others have."""
        return self.digest or self._unsaved


class DecidingLinear(nn.Linear):
    """A linear layer whose output becomes a decision or a weighting; it stays in float32 whatever dtype the model has.

    In half precision a probability is off by up to 0.09, because the states that it reads have entries in the
    thousands.
    """


P = TypeVar("P", bound=Parts)


class PartsRun(LearnedRun, Generic[P]):
    """Parts of one kind under one plan on one model."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], parts: P, threshold: float | None = None) -> None:
        """Take one mode per layer. Subclasses raise Refused where modes, model and parts do not fit together."""
        self.decoder, self.modes, self.parts = decoder, tuple(modes), parts
        self.name: str = parts.kind
        self.identity: Hashable = (parts.kind, parts.identity, threshold)

    def attach_reference(self, model: nn.Module, progress: Progress, hooks: ExitStack) -> None:
        """Surround each dense layer with `before` and `after`."""

        def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
            return self.before(progress, index, hidden_BTD, kwargs)

        def leave(index: int, _: nn.Module, args: tuple[Tensor], output_BTD: Tensor) -> Tensor:
            return self.after(progress, index, args[0], output_BTD)

        for index, layer in enumerate(self.decoder.layers):
            hooks.callback(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(partial(leave, index)).remove)

    def before(
        self, progress: Progress, index: int, hidden_BTD: Tensor, arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Return what a dense layer receives in the reference."""
        return (hidden_BTD,), arguments

    def after(self, progress: Progress, index: int, entered_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Return what comes out of a dense layer in the reference."""
        return output_BTD
