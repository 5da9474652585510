"""A trainer without a model: a vector that follows numbers made of the samples' names, by AdamW."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortv.errors import Refused, SampleError
from shortv.families.parts import Parts
from shortv.learned.trainer import (
    Executing,
    Reduce,
    flat_state,
    generator,
    learning_rate,
    restore_flat_state,
    set_learning_rate,
)
from shortv.plan import Mode, PartsKind
from shortv.sample import Sample
from shortv.workers.training.kinds import Kind, PlanSpec

WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyRecipe:
    """`dies_at` names a step before which the process kills itself, once: a file then marks it."""

    steps: int = 7
    batch_size: int = 4
    learning_rate: float = 0.1
    seed: int = 0
    nan_at: int | None = None
    dies_at: int | None = None
    marker: str = ""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise Refused("the learning rate is not positive; give another")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySettings:
    width: int = WIDTH


class ToyParts(Parts):
    """One vector."""

    kind = PartsKind.SAISA

    def __init__(self) -> None:
        super().__init__()
        self.settings = ToySettings()
        self.vector = nn.Parameter(torch.zeros(WIDTH))


class ToyTrainer:
    """Follows the mean of the samples' numbers, with noise of (seed, step)."""

    def __init__(self, recipe: ToyRecipe, reduce: Reduce) -> None:
        self.steps, self.batch_size = recipe.steps, recipe.batch_size
        self._recipe, self._reduce = recipe, reduce
        self._parts = ToyParts()
        self._optimizer = torch.optim.AdamW(self._parts.parameters(), lr=recipe.learning_rate)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        recipe = self._recipe
        for sample in samples:
            self.check(sample)
        if step == recipe.dies_at and not Path(recipe.marker).exists():
            Path(recipe.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rate = learning_rate(step, steps=self.steps, peak=recipe.learning_rate, warmup_steps=2)
        set_learning_rate(self._optimizer, rate)
        noise = torch.randn(WIDTH, generator=generator(recipe.seed, step))
        targets_BD = torch.stack([_numbers(sample) for sample in samples])
        loss = (self._parts.vector + 0.1 * noise - targets_BD).square().mean()
        if step == recipe.nan_at:
            loss = loss * math.nan
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._reduce(self._parts.parameters())
        self._optimizer.step()
        return {"loss": float(loss.detach()), "learning_rate": rate, "share": 0.5}

    def check(self, sample: Sample) -> None:
        if sample.prompt == "bad":
            raise SampleError(stage="decode", error="fake", message=f"{sample.sample_id} is bad")

    def state(self) -> dict[str, Tensor]:
        return flat_state(dict(self._parts.named_parameters()), self._optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        restore_flat_state(state, dict(self._parts.named_parameters()), self._optimizer)

    def parts(self) -> ToyParts:
        return self._parts


def _numbers(sample: Sample) -> Tensor:
    digest = hashlib.sha256(sample.sample_id.encode()).digest()[:WIDTH]
    return torch.tensor([byte / 128 - 1 for byte in digest])


def make_toy(loaded: Any, recipe: ToyRecipe, *, executing: Executing, reduce: Reduce) -> ToyTrainer:
    return ToyTrainer(recipe, reduce)


def toy_plans(parts: Parts, num_layers: int, thresholds: tuple[float, ...]) -> tuple[PlanSpec, ...]:
    return (PlanSpec(name="toy", modes=(Mode.FREEZE_VISUAL,) * num_layers),)


def toy_needs_answers(recipe: ToyRecipe) -> bool:
    return True


TOY = Kind(make_trainer=make_toy, plans=toy_plans, needs_answers=toy_needs_answers, questions=("count",))


def toy_samples(number: int, bad: Sequence[int] = ()) -> list[Sample]:
    return [
        Sample(sample_id=f"s{index}", prompt="bad" if index in bad else "good", answer="yes") for index in range(number)
    ]
