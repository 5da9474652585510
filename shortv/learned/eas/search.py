"""The search for redundant layers: a bandit with a score for each layer, played with sets of layers.

Source: arXiv 2403.15226 and its released code, which differ in places between LaVIN and LLaVA; the settings name them.
Shapes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shortv.errors import Refused, ShortVError
from shortv.learned.trainer import generator

Probability = Literal["sigmoid", "softmax"]
Candidate = tuple[int, ...]
"""Layers whose attention is skipped together, in ascending order."""
_SHARPNESS = 10.0
_TRIES = 50
"""Draws for each candidate of a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """The rules of the search. Raises Refused on construction.

    `probability` of a layer is `sigmoid(s)` (LLaVA-EAS; the default, because the update's p (1 - p) is its derivative)
    or `softmax(10 s)` over the layers (LaVIN, with the same update). With `grows` the sets begin with one layer and
    have all `skip` from half of the warm-up on (LLaVA-EAS); without, they have all from the start (LaVIN).
    """

    num_layers: int
    skip: int
    """Layers of a set."""
    candidates: int = 5
    """Sets that a round compares."""
    every: int = 3
    """Training steps from a round to the next."""
    warmup: int = 0
    """Training steps before the first round."""
    eta: float = 1.0
    probability: Probability = "sigmoid"
    grows: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.skip < self.num_layers:
            raise Refused(f"a search for {self.skip} of {self.num_layers} layers has no choice; skip fewer, or some")
        if self.candidates < 2 or self.every < 1 or self.warmup < 0:
            raise Refused(
                f"a round of {self.candidates} candidates every {self.every} steps after {self.warmup} compares "
                "nothing; give at least 2 candidates and 1 step"
            )
        if not 0 < self.eta < math.inf:
            raise Refused(f"the step of the scores, --eta, is {self.eta:g}; give a positive number")
        if self.probability not in get_args(Probability):
            raise Refused(f"unknown probability {self.probability!r}; choose one of {', '.join(get_args(Probability))}")


class Search:
    """Scores of the layers. What is drawn depends on scores, seed and step alone."""

    def __init__(self, settings: SearchSettings) -> None:
        """Start with equal scores."""
        self.settings = settings
        self.scores_L = torch.zeros(settings.num_layers, dtype=torch.float64)

    @property
    def probability_L(self) -> Tensor:
        """What sets are drawn in proportion to."""
        if self.settings.probability == "softmax":
            return (_SHARPNESS * self.scores_L).softmax(0)
        return self.scores_L.sigmoid()

    def size(self, step: int) -> int:
        """Layers of a set at a training step."""
        skip, warmup = self.settings.skip, self.settings.warmup
        if not self.settings.grows or not warmup:
            return skip
        return min(skip, 2 * skip * step // warmup + 1)

    def drawn(self, step: int) -> Candidate:
        """The layers that a training step skips."""
        return _drawn(self.probability_L, self.size(step), generator(self.settings.seed, step, "skip"))

    def is_round(self, step: int) -> bool:
        """Whether candidates are compared before that training step."""
        past = step - self.settings.warmup
        return past >= 0 and past % self.settings.every == 0

    def candidates(self, step: int) -> tuple[Candidate, ...]:
        """Distinct sets of a round; fewer than asked for where (almost) no more exist."""
        draw = generator(self.settings.seed, step, "candidates")
        most = min(self.settings.candidates, math.comb(self.settings.num_layers, self.size(step)))
        found: dict[Candidate, None] = {}
        for probability_L in (self.probability_L, torch.ones_like(self.scores_L)):
            # Scores that are far apart draw hardly any set but one; chance finds the others then.
            tries = _TRIES * most
            while len(found) < most and tries:
                found[_drawn(probability_L, self.size(step), draw)] = None
                tries -= 1
        return tuple(found)

    def play(self, step: int, evaluate: Callable[[Sequence[Candidate]], Sequence[float]]) -> None:
        """Play a round.

        Args:
            evaluate: the loss of each candidate in nats per token, all on the same held-out samples.

        Raises:
            ShortVError: a loss is not finite.
        """
        candidates = self.candidates(step)
        self.update(candidates, evaluate(candidates))

    def update(self, candidates: Sequence[Candidate], losses: Sequence[float]) -> None:
        """s_i += eta (r - mean r) p_i (1 - p_i) for every layer i of every candidate, with reward r = exp(-loss)."""
        bad = [loss for loss in losses if not math.isfinite(loss)]
        if bad:
            raise ShortVError(f"a candidate of the search has loss {bad[0]}; lower the learning rate")
        rewards_K = torch.tensor(losses, dtype=torch.float64).neg().exp()
        advantages_K = rewards_K - rewards_K.mean()
        slope_L = self.probability_L * (1 - self.probability_L)
        for candidate, advantage in zip(candidates, advantages_K, strict=True):
            layers = list(candidate)
            self.scores_L[layers] += self.settings.eta * advantage * slope_L[layers]

    def chosen(self) -> Candidate:
        """The layers of highest score, as many as are to be skipped."""
        return tuple(sorted(ranked(self.scores_L.tolist())[: self.settings.skip]))


def _drawn(probability_L: Tensor, size: int, draw: torch.Generator) -> Candidate:
    # multinomial refuses to draw what has a probability of exactly 0.
    layers_N = torch.multinomial(probability_L.clamp(min=1e-12), size, replacement=False, generator=draw)
    return tuple(sorted(layers_N.tolist()))


def ranked(scores: Sequence[float]) -> tuple[int, ...]:
    """Layers by score, the most redundant first; of equal ones the deeper."""
    return tuple(sorted(range(len(scores)), key=lambda layer: (-scores[layer], -layer)))
