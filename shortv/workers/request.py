"""What a user asked a sweep to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shortv.errors import Refused
from shortv.plan import Mode, parse_mode
from shortv.records import KlDirection
from shortv.spec import ModelSpec, WorkerRange

DEFAULT_MODES = (Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT)
ABLATIONS = tuple(mode for mode in Mode if mode is not Mode.FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """One sweep: model, samples, what to ablate, and how to run it."""

    model: ModelSpec
    calibration: tuple[str, ...]
    output_path: str
    modes: tuple[Mode, ...] = DEFAULT_MODES
    kl_direction: KlDirection = KlDirection.FULL_ABLATED
    batch_size: int = 8
    limit: float | None = None
    """Samples per calibration source: a count, or below 1 a share."""
    seed: int = 0
    include_path: str | None = None
    workers: WorkerRange | None = None
    """None: one per free GPU, or one on CPUs."""
    gpus_per_worker: float = 1
    device: str = "auto"
    layers_per_unit: int | None = None
    stack: int | None = None
    fail_on_error: float = 0.0
    """Share of samples that may end in errors with exit status 0."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that decide the result, by the name of their option."""
        return {
            "model": self.model.name,
            "revision": self.model.revision,
            "dtype": self.model.dtype,
            "attn-implementation": self.model.attn_implementation,
            "trust-remote-code": self.model.trust_remote_code,
            "chat-template": self.model.chat_template,
            "calibration": list(self.calibration),
            "modes": [str(mode) for mode in self.modes],
            "kl-direction": str(self.kl_direction),
            "batch-size": self.batch_size,
            "limit": self.limit,
            "seed": self.seed,
        }

    def check_numbers(self) -> None:
        """Raise Refused for a number that its option cannot have."""
        for name in ("batch_size", "layers_per_unit", "stack"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"--{name.replace('_', '-')} is {value}; give 1 or more")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise Refused(f"--limit is {self.limit:g}; give a number of samples, or a share between 0 and 1")
        if not 0 <= self.fail_on_error <= 1:
            raise Refused(f"--fail-on-error is {self.fail_on_error:g}; give a share of samples between 0 and 1")
        if not self.gpus_per_worker > 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise Refused(f"--gpus-per-worker is {self.gpus_per_worker:g}; give a whole number, or a share below 1")


def parse_workers(text: str, option: str = "--workers") -> WorkerRange:
    """Read `N` or `MIN:MAX`; raises Refused for anything else."""
    try:
        return WorkerRange.parse(text)
    except ValueError as error:
        raise Refused(f"{option} is {text!r}; {error}") from None


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Read a comma-separated list of modes, or `all`; the order of the answer is the canonical one."""
    if text.strip() == "all":
        return ABLATIONS
    found = {parse_mode(name.strip()) for name in text.split(",") if name.strip()}
    if not found:
        raise Refused(f"--modes is {text!r}; give some of {', '.join(ABLATIONS)}, or all")
    if Mode.FULL in found:
        raise Refused("--modes names 'full', which changes nothing; give the modes to measure")
    return tuple(mode for mode in ABLATIONS if mode in found)
