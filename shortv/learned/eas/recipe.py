"""Everything that trained adapters depend on besides model and samples."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

from shortv.errors import Refused
from shortv.families.parts.eas import EasSettings
from shortv.learned.eas.search import Probability, SearchSettings
from shortv.learned.trainer import check_rates

Choice = Literal["search", "random", "given"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EasRecipe:
    """How adapters are trained: the layers are searched for first, unless they are `random` ones or `given`.

    Rates are those of LLaVA-EAS, ranks those of LaVIN-EAS. `given` without layers trains adapters of full attention.
    Dropout on the bottleneck (0.1 in the released code) is left out: the executors run in evaluation mode.
    `held_out` is the share of samples, drawn by their ids, that the search rewards candidates on and never trains on;
    with 0 it takes each round's own batch before training on it (LLaVA-EAS). Both trainings take `batch_size` samples
    a step; the one with chosen layers trains on all samples.
    """

    choice: Choice = "search"
    skip: int | None = None
    """Layers to skip; a third of them unless given."""
    layers: tuple[int, ...] = ()
    """The layers to skip where they are given."""
    steps: int = 1200
    """Of search and training together."""
    search_steps: int | None = None
    """Of these, the search; a third unless given, none where there is nothing to search."""
    batch_size: int = 16
    learning_rate: float = 4e-4
    search_learning_rate: float = 2e-4
    warmup_steps: int = 0
    weight_decay: float = 0.02
    gradient_norm: float = 1.0
    seed: int = 0
    kept_rank: int = 8
    pia_rank: int = 32
    groups: int = 2
    scale: float = 1.0
    temperature: float = 10.0
    start: str = "identity"
    candidates: int = 5
    every: int = 3
    eta: float = 1.0
    search_warmup: int | None = None
    """Steps of the search before its first round; half of the search unless given (LaVIN)."""
    probability: Probability = "sigmoid"
    grows: bool = True
    held_out: float = 0.25

    def __post_init__(self) -> None:
        _ = self.settings(kept=(), skipped=())
        if self.choice not in get_args(Choice):
            raise Refused(f"choice is {self.choice!r}; choose one of {', '.join(get_args(Choice))}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} is {getattr(self, name)}; give at least 1")
        check_rates({"--learning-rate": self.learning_rate, "search_learning_rate": self.search_learning_rate})
        if not 0 < self.gradient_norm < math.inf:
            raise Refused(f"gradient_norm is {self.gradient_norm:g}; give a positive number")
        if not 0 <= self.held_out < 1:
            raise Refused(f"--held-out is {self.held_out:g}; give a share of the samples, from 0 to below 1")
        if self.layers and self.choice != "given":
            raise Refused(f"layers are listed, but the choice is {self.choice!r}; make it 'given', or list none")
        if self.choice == "given" and self.skip not in (None, len(self.layers)):
            raise Refused(f"{len(self.layers)} layers are listed and {self.skip} are to be skipped; leave skip out")
        if self.choice == "search" and not 0 < self.searching < self.steps:
            raise Refused(
                f"{self.searching} of {self.steps} steps for the search leave none for it or for the training after "
                "it; give fewer search steps, at least 1"
            )

    @property
    def searching(self) -> int:
        """Steps of the search."""
        if self.choice != "search":
            return 0
        return self.steps // 3 if self.search_steps is None else self.search_steps

    def settings(
        self, *, kept: tuple[int, ...], skipped: tuple[int, ...], scores: tuple[float, ...] = ()
    ) -> EasSettings:
        """Those of the parts."""
        return EasSettings(
            kept=kept,
            skipped=skipped,
            kept_rank=self.kept_rank,
            pia_rank=self.pia_rank,
            groups=self.groups,
            scale=self.scale,
            temperature=self.temperature,
            start=self.start,
            scores=scores,
        )

    def search(self, num_layers: int) -> SearchSettings:
        """Those of the search. Raises Refused where so many layers leave no choice."""
        return SearchSettings(
            num_layers=num_layers,
            skip=self._count(num_layers),
            candidates=self.candidates,
            every=self.every,
            warmup=self.searching // 2 if self.search_warmup is None else self.search_warmup,
            eta=self.eta,
            probability=self.probability,
            grows=self.grows,
            seed=self.seed,
        )

    def fixed_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to skip where nothing is searched. Raises Refused for more than the model has."""
        if self.choice == "given":
            return tuple(sorted(self.layers))
        count = self._count(num_layers)
        if not 0 <= count <= num_layers:
            raise Refused(f"{count} layers to skip of {num_layers}; skip as many as there are, or fewer")
        return tuple(sorted(random.Random(f"{self.seed}-layers").sample(range(num_layers), count)))

    def _count(self, num_layers: int) -> int:
        return num_layers // 3 if self.skip is None else self.skip
