"""Learning rates, as recipes state them and as steps use them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

Rate = Annotated[float, Field(gt=0, le=1, description="Highest learning rate.")]
Steps = Annotated[int, Field(ge=1, le=2**31 - 1, description="Optimizer steps.")]
BatchSize = Annotated[
    int,
    Field(ge=1, le=2**31 - 1, description="Samples per step, over all workers.", json_schema_extra={"short": "-b"}),
]
TrainingSeed = Annotated[int, Field(ge=0, le=2**53 - 1, description="Of weights, order and generated samples.")]


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int = 0, last: float = 0.01) -> float:
    """Return the rate of a step: a linear warm-up to `peak`, then a cosine down to `last` of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))
