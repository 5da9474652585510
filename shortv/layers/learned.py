"""How each kind of learned parts runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from shortv.errors import Refused
from shortv.families import Decoder
from shortv.families.parts.base import Learned
from shortv.layers.adapted import AdaptedRun
from shortv.layers.exits import Exits
from shortv.layers.fast import execute
from shortv.layers.progress import Progress
from shortv.layers.projected import ProjectedRun
from shortv.layers.sequence import SequenceState
from shortv.plan import WORK, Mode, PartsKind, works_of


class LearnedRun(Protocol):
    """A plan with learned parts on one model, from the entry of the context to its end."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], learned: Learned) -> None:
        """Check that the parts can run under these modes. Raises Refused."""

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        """How that layer runs; None leaves it to the model."""
        ...

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Hook what is needed beside the layers."""

    def attach_reference(self, model: nn.Module, sequence: SequenceState, hooks: ExitStack) -> None:
        """The same plan, slow and obviously right: hooks on dense layers, those of the modes included."""


class ModesAlone:
    """A plan without learned parts."""

    def __init__(self, modes: Sequence[Mode]) -> None:
        """Take one mode per layer."""
        self._works = works_of(modes)

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        """A full layer is the model's own."""
        return None if self._works[index] == WORK[Mode.FULL] else execute

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Nothing more."""


LEARNED: dict[PartsKind, Callable[[Decoder, Sequence[Mode], Learned], Any]] = {
    PartsKind.DYVTE: Exits,
    PartsKind.EAS: AdaptedRun,
    PartsKind.SAISA: ProjectedRun,
}
"""How a plan with parts of each kind runs: a LearnedRun."""


def run_of(decoder: Decoder, modes: Sequence[Mode], learned: Learned | None) -> ModesAlone | LearnedRun:
    """How a plan runs on a model. Raises Refused where its parts cannot run under these modes, or not at all."""
    if learned is None:
        return ModesAlone(modes)
    kind = learned.parts.kind
    if kind not in LEARNED:
        raise Refused(f"this version runs no {kind} parts; it runs {', '.join(LEARNED) or 'none'}: update it")
    run: LearnedRun = LEARNED[kind](decoder, modes, learned)
    return run
