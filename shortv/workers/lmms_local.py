"""The model `shortv` of lmms-eval, where its two rooms meet: evals asks, layers skips work. Needs no Ray."""

from contextlib import AbstractContextManager
from typing import Any

from shortv.evals.backend import PlannedModel
from shortv.learned.apply import apply
from shortv.plan import Plan


class ShortV(PlannedModel):
    """A model under a plan, asked in lmms-eval's chat form."""

    @staticmethod
    def apply(model: Any, plan: Plan) -> AbstractContextManager[list[str]]:
        """Put a model under a plan."""
        return apply(model, plan)


class SimpleShortV(ShortV):
    """The same for `--force_simple`, the form in which lmms-eval asks for likelihoods (multiple choice)."""

    is_simple = True
