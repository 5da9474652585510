"""A trainer without a model: a vector that follows numbers made of the samples' names, by AdamW."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortv.errors import SampleError
from shortv.learned.base import Parts
from shortv.learned.system import PlanSpec, System, alone, learning_rate
from shortv.learned.training import Trainer, generator
from shortv.plan import Mode, PartsKind
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.spec import Spec
from shortv.workers.training.data import Order
from shortv.workers.training.loop import Group, Row, run_loop

WIDTH = 8


class ToyRecipe(Spec):
    """`dies_at` names a step before which the process kills itself: once, if it can write the file `marker`."""

    steps: int = 7
    batch_size: int = 4
    learning_rate: float = 0.1
    seed: int = 0
    nan_at: int | None = None
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

    def __init__(self, recipe: ToyRecipe, reduce: Any = alone) -> None:
        super().__init__(None, recipe, reduce)  # type: ignore[arg-type]  # it has no model
        self._parts = ToyParts()
        self._optimizer = torch.optim.AdamW(self._parts.parameters(), lr=recipe.learning_rate)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        recipe = self._recipe
        for sample in samples:
            self.check(sample)
        if step == recipe.dies_at and not Path(recipe.marker).exists():
            with suppress(OSError):
                Path(recipe.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rate = learning_rate(step, steps=self.steps, peak=recipe.learning_rate, warmup_steps=2)
        noise = torch.randn(WIDTH, generator=generator(recipe.seed, step))
        loss = (self._parts.vector + 0.1 * noise - torch.stack([_numbers(one) for one in samples])).square().mean()
        loss = loss * math.nan if step == recipe.nan_at else loss
        self._backward(loss, list(self._parts.parameters()))
        self._update(list(self._parts.parameters()), rate)
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

    def __init__(self, *, needs_images: bool = False) -> None:
        self.needs_images = needs_images

    def plans(self, settings: ToySettings, num_layers: int, thresholds: Sequence[float]) -> tuple[PlanSpec, ...]:
        return (PlanSpec("toy", (Mode.FREEZE_VISUAL,) * num_layers),)

    def trainer(self, loaded: Any, recipe: ToyRecipe, reduce: Any = alone) -> ToyTrainer:
        return ToyTrainer(recipe, reduce)


def toy_samples(number: int, bad: Sequence[int] = ()) -> list[Sample]:
    return [
        Sample(sample_id=f"s{index}", prompt="bad" if index in bad else "good", answer="yes") for index in range(number)
    ]


class Recorded:
    """What the loop reported, without and with checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: list[Row] = []
        self.states: dict[int, Mapping[str, Tensor]] = {}
        self.errors: Mapping[str, ErrorRecord] = {}

    def progress(self, row: Row) -> None:
        self.steps.append(row["step"])

    def save(
        self, step: int, state: Mapping[str, Tensor], rows: Sequence[Row], errors: Mapping[str, ErrorRecord]
    ) -> None:
        self.states[step], self.errors = state, dict(errors)
        self.rows += rows


def loop(
    trainer: Trainer[Any], batches: Sequence[Sequence[Sample]], *, start: int = 0, every: int = 1, into: Any = None
) -> Recorded:
    """Run the loop alone, and return what it reported."""
    report = into or Recorded()
    hooks: dict[str, Any] = {"progress": report.progress, "save": report.save}
    run_loop(trainer, batches, start=start, checkpoint_every=every, group=Group(), **hooks)
    return report


def trained(
    recipe: ToyRecipe, samples: Sequence[Sample], *, start: int = 0, state: Any = None, **more: Any
) -> Recorded:
    """Train the toy to the end, from a state where given."""
    trainer, order = ToyTrainer(recipe), Order(samples=len(samples), batch_size=recipe.batch_size, seed=recipe.seed)
    if state:
        trainer.restore(state)
    batches = [[samples[row] for row in order.rows(step)] for step in range(start, recipe.steps)]
    return loop(trainer, batches, start=start, **more)
