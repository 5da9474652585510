"""A trainer without a model: a vector that follows numbers made of the samples' names, by AdamW."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortv.errors import SampleError
from shortv.learned.base import Parts
from shortv.learned.rates import learning_rate
from shortv.learned.system import PlanSpec, Reduce, System
from shortv.learned.training import Trainer, generator, set_learning_rate
from shortv.plan import Mode, PartsKind
from shortv.sample import Sample
from shortv.spec import Spec

WIDTH = 8


class ToyRecipe(Spec):
    """`dies_at` names a step before which the process kills itself: once, if it can write the file `marker`."""

    steps: int = 7
    batch_size: int = 4
    learning_rate: float = 0.1
    seed: int = 0
    nan_at: int | None = None
    raises_at: int | None = None
    dies_at: int | None = None
    marker: str = ""


class ToySettings(Spec):
    width: int = WIDTH


class ToyParts(Parts):
    """One vector."""

    kind = PartsKind.SAISA

    def __init__(self) -> None:
        super().__init__(ToySettings())
        self.vector = nn.Parameter(torch.zeros(WIDTH))


class ToyTrainer(Trainer[ToyParts]):
    """Follows the mean of the samples' numbers, with noise of (seed, step)."""

    def __init__(self, recipe: ToyRecipe, reduce: Reduce) -> None:
        super().__init__(None, recipe, reduce)  # type: ignore[arg-type]  # it has no model
        self._recipe = recipe
        self._parts = ToyParts()
        self._optimizer = torch.optim.AdamW(self._parts.parameters(), lr=recipe.learning_rate)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        recipe = self._recipe
        for sample in samples:
            self.check(sample)
        if step == recipe.raises_at:
            raise MemoryError("toy")
        if step == recipe.dies_at and not Path(recipe.marker).exists():
            with suppress(OSError):
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


def _numbers(sample: Sample) -> Tensor:
    digest = hashlib.sha256(sample.sample_id.encode()).digest()[:WIDTH]
    return torch.tensor([byte / 128 - 1 for byte in digest])


class Toy(System):
    """Parts that need no model."""

    kind = PartsKind.SAISA
    settings = ToySettings
    recipe = ToyRecipe
    questions = ("count",)

    def plans(self, settings: ToySettings, num_layers: int, thresholds: Sequence[float]) -> tuple[PlanSpec, ...]:
        return (PlanSpec("toy", (Mode.FREEZE_VISUAL,) * num_layers),)

    def trainer(self, loaded: Any, recipe: ToyRecipe, reduce: Reduce) -> ToyTrainer:
        return ToyTrainer(recipe, reduce)


class ToyOfImages(Toy):
    """The same, for samples with images."""

    needs_images = True


TOY = Toy()


def toy_samples(number: int, bad: Sequence[int] = ()) -> list[Sample]:
    return [
        Sample(sample_id=f"s{index}", prompt="bad" if index in bad else "good", answer="yes") for index in range(number)
    ]
