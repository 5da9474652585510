"""The rows of a sweep folder's tables as plain values."""

from dataclasses import dataclass
from enum import StrEnum

from shortv.plan import Mode


class KlDirection(StrEnum):
    """Which distribution comes first in the KL divergence (FULL_ABLATED in ShortV, section 1)."""

    FULL_ABLATED = "full-ablated"
    ABLATED_FULL = "ablated-full"

    @property
    def column(self) -> str:
        """Name of the lc_samples column, and of the LcRecord field, that holds this direction."""
        return "kl_" + self.value.replace("-", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class LcRecord:
    """The effect of one ablation on one sample: a row of lc_samples.

    KL divergences are in nats, between next-token distributions at the last prompt position.
    """

    sample_id: str
    mode: Mode
    layer: int
    kl_full_ablated: float
    kl_ablated_full: float
    top1_changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """Why one sample could not be used: a row of errors."""

    sample_id: str
    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """Layer Contribution of one mode in one layer over all counted samples: a row of lc_layers.

    `mean`, `ci_low` and `ci_high` are in nats. Ranks count from 1, the layer to replace first.
    Intervals are 95 %, from one set of bootstrap resamples.
    """

    mode: Mode
    layer: int
    n: int
    kl_direction: KlDirection
    mean: float
    ci_low: float
    ci_high: float
    rank: int
    rank_low: int
    rank_high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedSample:
    """A sample that was measured, with its prompt's token counts: a row of samples."""

    sample_id: str
    dataset: str | None
    prompt: str
    answer: str | None
    n_text: int
    n_visual: int
