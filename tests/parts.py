"""Learned parts that are small enough to be followed by hand: each layer's output is shifted by a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor, nn

from shortv.families import Decoder, LoadedModel, decoder_of
from shortv.layers.fast import PlannedLayer
from shortv.learned.base import Parts, PartsRun
from shortv.learned.files import save_parts
from shortv.learned.registry import SYSTEMS, run_of
from shortv.learned.system import PlanSpec, System
from shortv.plan import LearnedParts, Mode, PartsKind, Plan
from shortv.spec import Spec


class Trained(NamedTuple):
    """Parts as a plan uses them."""

    parts: Any
    threshold: float | None = None


def running(executor: Any, model: Any, modes: Sequence[Mode], trained: Trained) -> AbstractContextManager[None]:
    """Run a model under modes and parts with `executing` or `reference`."""
    run = run_of(decoder_of(model), modes, trained.parts, trained.threshold)
    found: AbstractContextManager[None] = executor(model, modes, run)
    return found


def shuffled(parts: Any, *, seed: int = 0, size: float = 0.3) -> Any:
    """Parts whose every weight and bias is drawn at random, as if they had been trained for long."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in parts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * size)
    return parts.requires_grad_(False)


class ShiftSettings(Spec):
    """Which layers are shifted."""

    layers: tuple[int, ...]


class ShiftParts(Parts):
    """A vector for each shifted layer, times the threshold where they run as DyVTE's."""

    kind = PartsKind.DYVTE

    def __init__(self, width: int, settings: ShiftSettings) -> None:
        super().__init__(settings)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in settings.layers)

    @classmethod
    def build(cls, decoder: Decoder, settings: ShiftSettings) -> Self:
        return cls(int(decoder.config.get_text_config().hidden_size), settings)

    def place(self, decoder: Decoder) -> None:
        self.to(decoder.device(decoder.layers[0]))


class ShiftRun(PartsRun[ShiftParts]):
    """Adds the vectors."""

    def __init__(
        self, decoder: Decoder, modes: Sequence[Mode], parts: ShiftParts, threshold: float | None = None
    ) -> None:
        super().__init__(decoder, modes, parts, threshold)
        self._shifts = dict(zip(parts.settings.layers, parts.shifts, strict=True))
        self.times = 1.0 if threshold is None else threshold

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        if index not in self._shifts:
            return None

        def shifted(planned: PlannedLayer, hidden_BTD: Tensor, **arguments: Any) -> Tensor:
            return planned.own(hidden_BTD, **arguments) + self.times * self._shifts[index]

        return shifted

    def attach_reference(self, model: nn.Module, sequence: Any, hooks: Any) -> None:
        raise NotImplementedError


class ShiftSystem(System):
    """Parts that shift."""

    settings = ShiftSettings

    def __init__(self, parts: type[ShiftParts]) -> None:
        self._parts = parts

    def plans(self, settings: Any, num_layers: int, thresholds: Sequence[float]) -> tuple[PlanSpec, ...]:
        return (PlanSpec("shift", (Mode.FULL,) * num_layers),)

    def parts_class(self) -> type[Parts]:
        return self._parts

    def run(self, decoder: Decoder, modes: Sequence[Mode], parts: Any, threshold: float | None = None) -> ShiftRun:
        return ShiftRun(decoder, modes, parts, threshold)


def register(monkeypatch: pytest.MonkeyPatch, kind: PartsKind = PartsKind.DYVTE) -> type[ShiftParts]:
    """Let parts of that kind be these, for one test."""
    parts = type("ShiftParts", (ShiftParts,), {"kind": kind})
    monkeypatch.setitem(SYSTEMS, kind, ShiftSystem(parts))  # type: ignore[arg-type]
    return parts


def save_shifts(
    folder: Path, loaded: LoadedModel, kind: type[ShiftParts] = ShiftParts, *, seed: int = 0, layers: tuple[int, ...]
) -> LearnedParts:
    """Save random shifts of these layers for a model, and name them (with the threshold 0.5 where they have one)."""
    parts = kind.build(loaded.decoder, ShiftSettings(layers=layers))
    draw = torch.Generator().manual_seed(seed)
    for shift in parts.shifts:
        shift.data = torch.randn(shift.shape, generator=draw)
    return save_named(folder, loaded, parts, threshold=0.5 if kind.kind is PartsKind.DYVTE else None)


def save_named(
    folder: Path,
    loaded: LoadedModel,
    parts: Parts,
    *,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LearnedParts:
    """Save parts for a model, and name them."""
    header = save_parts(
        folder,
        parts,
        dtype=dtype,
        model=loaded.name,
        revision=None,
        config_digest=loaded.architecture.config_digest,
        training={"command": "none"},
    )
    threshold = 0.5 if parts.kind is PartsKind.DYVTE and threshold is None else threshold
    return LearnedParts(kind=parts.kind, path=str(folder), digest=header.digest, threshold=threshold)


def plan_of(loaded: LoadedModel, parts: LearnedParts, name: str = "learned") -> Plan:
    """The plan that needs these parts and changes nothing else."""
    return Plan.full(
        num_layers=loaded.architecture.num_layers,
        name=name,
        model=loaded.name,
        config_digest=loaded.architecture.config_digest,
        parts=parts,
    )
