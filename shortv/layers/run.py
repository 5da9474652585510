"""What a learned system adds to a plan, as the executors see it; the systems themselves are in `shortv.learned`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from shortv.layers.progress import Progress
    from shortv.layers.sequence import SequenceState


class LearnedRun(Protocol):
    """A learned system under one plan on one model. It may be given to `executing` again, but not twice at a time."""

    name: str
    """What messages call the system's parts."""
    identity: Hashable
    """Equal for runs that compute the same; a KV cache is continued under an equal run alone."""
    needs_tower: bool = False
    """Whether a prefill needs the vision tower to run: stored vision features are not enough."""
    reads_prompt: bool = False
    """Whether the system reads a sequence's prompt, and must not take generated tokens for it."""
    drops_visual: bool = False
    """Whether visual tokens may leave a sequence for good, beyond what the modes say."""

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        """Return the forward of a layer, which takes a `PlannedLayer` first; None leaves the layer to the model."""
        ...

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Hook what is needed beside the layers."""

    def attach_reference(self, model: nn.Module, sequence: SequenceState, hooks: ExitStack) -> None:
        """Hook the whole plan, modes included, onto dense layers: slow, and equal by definition."""
        ...
