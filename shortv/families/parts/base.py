"""What every kind of learned parts is: a module built for a decoder from a few settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from shortv.architecture import Architecture
from shortv.families.decoder import Decoder
from shortv.plan import PartsKind


class Parts(nn.Module):
    """Learned parts of one model. Subclasses say which settings they have and build themselves from a decoder."""

    kind: ClassVar[PartsKind]
    needs_tower: ClassVar[bool] = False
    """Whether a prefill needs the vision tower itself to run: features that are kept from before are not enough."""
    reads_prompt: ClassVar[bool] = False
    """Whether they judge a sequence by its prompt, and must not take its answer for it."""
    digest: str | None = None
    """What names them: of weights and settings on disk. None: never saved, or in training."""
    settings: Any
    """A frozen dataclass of numbers, texts and tuples of them: what the weights alone don't tell."""

    @classmethod
    def build(cls, decoder: Decoder, settings: Any) -> Self:
        """Make parts with fresh weights, float32, each where its layer is. Raises Refused where a family has none."""
        raise NotImplementedError

    @classmethod
    def parse_settings(cls, content: dict[str, Any]) -> Any:
        """Read settings from the JSON beside the weights. Raises Refused."""
        raise NotImplementedError

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """What a plan's source has to say of the parts, for `shortv.costs.plan_flops_ratio` to count them."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Parts as a plan uses them; plans that differ in the threshold alone share the parts.

    Equal are those that do the same: parts of one digest, however often they were loaded.
    """

    parts: Parts = field(compare=False)
    threshold: float | None = None
    identity: tuple[PartsKind, str | Parts] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", (self.parts.kind, self.parts.digest or self.parts))

    def __deepcopy__(self, memo: dict[int, Any]) -> Learned:
        """Itself: a copied KV cache goes on under the plan that filled it, and shares its weights."""
        return self
