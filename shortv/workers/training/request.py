"""What a user asked a training to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shortv.errors import Refused
from shortv.plan import PartsKind
from shortv.spec import ModelSpec, WorkerRange

GENERATED = "generated"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One training: model, samples, recipe, and how to run it."""

    model: ModelSpec
    kind: PartsKind
    recipe: Any
    """The system's recipe."""
    thresholds: tuple[float, ...] = ()
    """Exit probabilities of DyVTE, a plan file each."""
    data: tuple[str, ...] = ()
    """Parquet files or lmms-eval tasks; empty: questions about generated scenes."""
    generated_samples: int = 4096
    parts_dtype: str = "float32"
    """What the parts are saved in; they are trained in float32."""
    questions: tuple[str, ...] = ()
    """Kinds of generated question; empty: those that suit the system."""
    output_path: str
    limit: float | None = None
    include_path: str | None = None
    workers: WorkerRange | None = None
    """None: one per free GPU, or one on CPUs."""
    device: str = "auto"
    checkpoint_every: int = 100
    timeout: float = 1800.0
    """Seconds without a finished step after which a run is given up."""
    fail_on_error: float = 0.0
    """Share of samples that may be unusable with exit status 0."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that decide the result, by the name of their option."""
        recipe = {name.replace("_", "-"): value for name, value in self.recipe.model_dump(mode="json").items()}
        return {
            "kind": str(self.kind),
            "model": self.model.name,
            "revision": self.model.revision,
            "dtype": self.model.dtype,
            "attn-implementation": self.model.attn_implementation,
            "trust-remote-code": self.model.trust_remote_code,
            "chat-template": self.model.chat_template,
            "data": list(self.data) or GENERATED,
            "limit": self.limit,
            "thresholds": list(self.thresholds),
            "parts-dtype": self.parts_dtype,
            **recipe,
        }

    def check_numbers(self) -> None:
        """Raise Refused for a number that its option cannot have."""
        at_least_1 = {
            "--steps": self.recipe.steps,
            "--batch-size": self.recipe.batch_size,
            "--checkpoint-every": self.checkpoint_every,
            "--samples": self.generated_samples,
        }
        for name, value in at_least_1.items():
            if value < 1:
                raise Refused(f"{name} is {value}; give 1 or more")
        if abs(self.recipe.seed) >= 2**63:
            raise Refused(f"--seed is {self.recipe.seed}; give a number that fits into 64 bits")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise Refused(f"--limit is {self.limit:g}; give a number of samples, or a share between 0 and 1")
        if not 0 <= self.fail_on_error <= 1:
            raise Refused(f"--fail-on-error is {self.fail_on_error:g}; give a share of samples between 0 and 1")
        for threshold in self.thresholds:
            if not 0 <= threshold <= 1:
                raise Refused(f"--threshold is {threshold:g}; give an exit probability, 0 to 1")
        if not 0 < self.timeout < math.inf:
            raise Refused(f"--timeout is {self.timeout:g}; give seconds")
