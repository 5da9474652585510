"""What a campaign needs from whoever runs its cells, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shortv.architecture import Architecture
from shortv.evals.aggregation import MetricRow
from shortv.evals.scoring import Sample
from shortv.plan import Plan
from shortv.workers.campaign.spec import CampaignSpec


class TaskFacts(NamedTuple):
    """An lmms-eval task: `digest` covers its configuration, its code and its documents.

    `main_metric` is the first metric of its configuration with higher_is_better; None takes the first one scored.
    """

    name: str
    digest: str
    num_docs: int
    main_metric: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """All samples of a cell, each once, and the metrics over those without an error.

    `seconds` is how long the questions took, without loading and scoring (None: the driver's own clock counts).
    `problem` says why there are no metrics: the answers are kept, and the cell has failed.
    """

    samples: Sequence[Sample]
    metrics: Sequence[MetricRow]
    seconds: float | None = None
    replicas: int | None = None
    problem: str | None = None


RunCell = Callable[[Plan | None, str], CellResult]
"""Answers one task under a plan, None being the unmodified model; raises ShortVError when the cell has failed."""


class Runner(Protocol):
    """Whoever answers the questions of a campaign."""

    def pin(self, model: str, recipe: CampaignSpec) -> str | None:
        """The commit that the recipe's revision of a model names now. Raises Refused."""

    def describe(self, model: str, recipe: CampaignSpec) -> Architecture:
        """Read a model's sizes from its configuration alone. Raises Refused."""

    def task(self, name: str, recipe: CampaignSpec) -> TaskFacts:
        """Load a task, once. Raises Refused for an unknown one, ShortVError when its data cannot be had."""

    def open(self, model: str, plans: Sequence[Plan], recipe: CampaignSpec) -> AbstractContextManager[RunCell]:
        """Start replicas that serve the model itself and these plans, and stop them at the end."""
