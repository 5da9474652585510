"""Learned parts that are small enough to be followed by hand: each layer's output is shifted by a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from shortv.families import Decoder, LoadedModel
from shortv.families.parts import Learned, Parts, save_parts, table
from shortv.layers import learned as running
from shortv.layers.fast import PlannedLayer
from shortv.layers.progress import Progress
from shortv.plan import LearnedParts, Mode, PartsKind, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftSettings:
    """Which layers are shifted."""

    layers: tuple[int, ...]


class ShiftParts(Parts):
    """A vector for each shifted layer, times the threshold where they run as DyVTE's."""

    kind = PartsKind.DYVTE

    def __init__(self, width: int, settings: ShiftSettings) -> None:
        super().__init__()
        self.settings = settings
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in settings.layers)

    @classmethod
    def build(cls, decoder: Decoder, settings: ShiftSettings) -> Self:
        return cls(decoder.layers[0].input_layernorm.weight.shape[0], settings)

    @classmethod
    def parse_settings(cls, content: dict[str, Any]) -> ShiftSettings:
        return ShiftSettings(layers=tuple(content["layers"]))


class ShiftRun:
    """Adds the vectors."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], learned: Learned) -> None:
        self._shifts = dict(zip(learned.parts.settings.layers, learned.parts.shifts, strict=True))
        self._times = 1.0 if learned.threshold is None else learned.threshold

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        if index not in self._shifts:
            return None

        def shifted(planned: PlannedLayer, hidden_BTD: Tensor, **arguments: Any) -> Tensor:
            return planned.own(hidden_BTD, **arguments) + self._times * self._shifts[index]

        return shifted

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Nothing more."""


def register(monkeypatch: pytest.MonkeyPatch, kind: PartsKind = PartsKind.DYVTE) -> type[ShiftParts]:
    """Let parts of that kind be these, for one test."""
    parts = type("ShiftParts", (ShiftParts,), {"kind": kind})
    monkeypatch.setitem(table.PARTS, kind, parts)
    monkeypatch.setitem(running.LEARNED, kind, ShiftRun)
    return parts


def save_shifts(
    folder: Path, loaded: LoadedModel, kind: type[ShiftParts] = ShiftParts, *, seed: int = 0, layers: tuple[int, ...]
) -> LearnedParts:
    """Save random shifts of these layers for a model, and name them (with the threshold 0.5 where they have one)."""
    parts = kind.build(loaded.decoder, ShiftSettings(layers=layers))
    draw = torch.Generator().manual_seed(seed)
    for shift in parts.shifts:
        shift.data = torch.randn(shift.shape, generator=draw)
    header = save_parts(
        folder,
        parts,
        model=loaded.name,
        revision=None,
        config_digest=loaded.architecture.config_digest,
        training={"command": "none"},
    )
    threshold = 0.5 if kind.kind is PartsKind.DYVTE else None
    return LearnedParts(kind=kind.kind, path=str(folder), digest=header.digest, threshold=threshold)


def plan_of(loaded: LoadedModel, parts: LearnedParts, name: str = "learned") -> Plan:
    """The plan that needs these parts and changes nothing else."""
    return Plan.full(
        num_layers=loaded.architecture.num_layers,
        name=name,
        model=loaded.name,
        config_digest=loaded.architecture.config_digest,
        parts=parts,
    )
