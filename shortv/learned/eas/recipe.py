"""What EAS's adapters are (settings) and how they are trained and their layers searched for (recipe)."""

from __future__ import annotations

import random
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shortv.errors import Refused
from shortv.learned.system import BatchSize, Rate, TrainingSeed
from shortv.plan import Mode, modes_of_layers
from shortv.spec import Count, Share, Spec

Layers = tuple[Annotated[int, Field(ge=0, lt=4096, strict=True)], ...]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Start = Literal["identity", "xavier"]
Probability = Literal["sigmoid", "softmax"]


class Shape(Spec):
    """What shape adapters have: shared by settings and recipe."""

    kept_rank: Rank = Field(default=8, description="Rank of the adapters in layers that keep their attention.")
    pia_rank: Rank = Field(default=32, description="Rank of the adapters in layers that skip their attention.")
    groups: Rank = Field(default=2, description="Groups of the two up-projections.")
    scale: float = 1.0
    temperature: float = Field(default=10.0, gt=0, description="Divides the logits of the routing.")
    start: Start = Field(
        default="identity",
        description="Up-projections in skipped layers start at zero (LaVIN-EAS; an untrained adapter changes nothing), "
        "or by Xavier (LLaVA-EAS). Those of kept layers start at zero.",
    )

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        for name in ("kept_rank", "pia_rank"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {self.groups} groups")
        return self


class EasSettings(Shape):
    """Which layers have which adapter, and what shape it has.

    During the search every layer has both; the layer's mode decides which one runs.
    """

    kept: Layers
    """Layers with the ordinary adapter, which runs where the mode is `full`."""
    skipped: Layers
    """Layers with a PIA, which runs where the mode is `skip-attention`."""
    scores: tuple[float, ...] = ()
    """How redundant the search found each layer's attention; empty without a search."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        for name in ("kept", "skipped"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"the {name} layers are not distinct: {list(getattr(self, name))}")
        return self

    def modes(self, num_layers: int) -> tuple[Mode, ...]:
        """Return the modes of the plan that runs with the parts after the search."""
        return modes_of_layers(Mode.SKIP_ATTENTION, self.skipped, num_layers)


class EasRecipe(Shape):
    """How adapters are trained: the layers are searched for first, unless they are `random` ones or `given`.

    Rates are those of LLaVA-EAS, ranks those of LaVIN-EAS. `given` without layers trains adapters of full attention.
    Dropout on the bottleneck (0.1 in the released code) is left out: the executors run in evaluation mode.
    The search and the training after it take `batch_size` samples a step; the second one trains on all samples.
    """

    choice: Literal["search", "random", "given"] = "search"
    skip: int | None = Field(default=None, description="Layers whose attention is skipped. [default: a third]")
    layers: Layers = Field(default=(), description="The layers to skip where they are given.")
    steps: Count = Field(default=1200, description="Optimizer steps, of search and training together.")
    search_steps: int | None = Field(default=None, description="Of the steps, those of the search. [default: a third]")
    batch_size: BatchSize = 16
    learning_rate: Rate = 4e-4
    search_learning_rate: Rate = 2e-4
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.02, ge=0)
    gradient_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    seed: TrainingSeed = 0
    candidates: int = Field(default=5, ge=2, le=4096, description="Sets of layers per round: LLaVA-EAS 5, LaVIN-EAS 3.")
    every: Count = Field(default=3, description="Steps from round to round: LLaVA-EAS 3, LaVIN-EAS 10.")
    eta: float = Field(default=1.0, gt=0, description="Step of the scores: LLaVA-EAS 1, LaVIN-EAS 2.")
    search_warmup: int | None = Field(
        default=None,
        ge=0,
        description="Steps of the search before its first round. [default: half, as LaVIN-EAS]",
    )
    probability: Probability = Field(
        default="sigmoid",
        description="Probability of a layer in the search, from its score s: sigmoid(s) (LLaVA-EAS; its derivative is "
        "the update's p (1 - p)), or softmax(10 s) (LaVIN-EAS).",
    )
    grows: bool = Field(
        default=True,
        description="Begin the search with one skipped layer (LLaVA-EAS), or with all (LaVIN-EAS).",
    )
    held_out: Share = Field(
        default=0.25,
        lt=1,
        description="Share of samples that only reward the search (LaVIN-EAS: a validation set); with 0 a round takes "
        "the samples of its step before training on them (LLaVA-EAS).",
    )

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.layers and self.choice != "given":
            raise ValueError(f"layers are listed, but the choice is {self.choice!r}; make it 'given', or list none")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"the layers are not distinct: {list(self.layers)}")
        if self.choice == "given" and self.skip not in (None, len(self.layers)):
            raise ValueError(f"{len(self.layers)} layers are listed and {self.skip} are to be skipped; leave skip out")
        if self.choice == "search" and not 0 < self.searching < self.steps:
            raise ValueError(
                f"{self.searching} of {self.steps} steps for the search leave none for it or for the training after "
                "it; give fewer search steps, at least 1"
            )
        return self

    @property
    def searching(self) -> int:
        """Steps of the search."""
        if self.choice != "search":
            return 0
        return self.steps // 3 if self.search_steps is None else self.search_steps

    @property
    def quiet(self) -> int:
        """Steps of the search before its first round."""
        return self.searching // 2 if self.search_warmup is None else self.search_warmup

    def settings(
        self, *, kept: tuple[int, ...], skipped: tuple[int, ...], scores: tuple[float, ...] = ()
    ) -> EasSettings:
        """Return the settings of parts with these layers."""
        shape = {name: getattr(self, name) for name in Shape.model_fields}
        return EasSettings(**shape, kept=kept, skipped=skipped, scores=scores)

    def count(self, num_layers: int) -> int:
        """Return how many layers are skipped. Raises Refused for more than the model has."""
        count = num_layers // 3 if self.skip is None else self.skip
        if not 0 <= count <= num_layers:
            raise Refused(f"{count} layers to skip of {num_layers}; skip as many as there are, or fewer")
        return count

    def fixed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers to skip where nothing is searched. Raises Refused for more than the model has."""
        if self.choice == "given":
            return tuple(sorted(self.layers))
        return tuple(sorted(random.Random(f"{self.seed}-layers").sample(range(num_layers), self.count(num_layers))))
