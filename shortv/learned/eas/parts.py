"""EAS's adapters: a PIA in each layer that skips its attention, an ordinary routed adapter in each that keeps it.

Source: arXiv 2403.15226 and its released code. Shapes: B batch, T positions, D width, R rank of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.learned.base import DecidingLinear, Parts
from shortv.learned.eas.recipe import EasSettings, Shape
from shortv.plan import PartsKind

_FFN = ("gate_proj", "up_proj", "down_proj", "act_fn")


class GroupedUp(nn.Module):
    """R -> D in groups: each group of outputs reads its own group of the bottleneck. Starts at zero."""

    def __init__(self, rank: int, width: int, groups: int) -> None:
        super().__init__()
        self._groups = groups
        self.weight = nn.Parameter(torch.zeros(width, rank // groups))
        self.bias = nn.Parameter(torch.zeros(width))

    @property
    def dense_DR(self) -> Tensor:
        """The weight as one matrix, zero between the groups."""
        block_diag: Callable[..., Tensor] = torch.block_diag
        return block_diag(*self.weight.chunk(self._groups))

    def forward(self, bottleneck_BTR: Tensor) -> Tensor:
        """Return (B, T, D)."""
        parts = zip(bottleneck_BTR.chunk(self._groups, dim=-1), self.weight.chunk(self._groups), strict=True)
        return torch.cat([linear(part, weight) for part, weight in parts], dim=-1) + self.bias


class Adapter(nn.Module):
    """A kept layer's routed adapter: y = x + s (w0 B + w1 D)(A x), with (w0, w1) = softmax(E mean(x) / t).

    x is the attention's input after its norm; A is `down`, B `first`, D `second`, E `routing`.
    """

    def __init__(self, width: int, rank: int, shape: Shape) -> None:
        super().__init__()
        self.scale, self._temperature = shape.scale, shape.temperature
        self.down = _down(width, rank)
        self.first = GroupedUp(rank, width, shape.groups)
        self.second = GroupedUp(rank, width, shape.groups)
        self.routing = DecidingLinear(width, 2)

    def summary(self, mean_BD: Tensor) -> tuple[Tensor, ...]:
        """Return what a sample's tokens share, from its prompt's mean row in float32: the routing weights (B, 2)."""
        logits_B2 = linear(mean_BD.float(), self.routing.weight.float(), self.routing.bias.float())
        return ((logits_B2 / self._temperature).softmax(-1).to(self.down.weight.dtype),)

    def bottleneck(self, normed_BTD: Tensor, *_: Tensor) -> Tensor:
        """Return what the up-projections read, (B, T, R)."""
        return cast(Tensor, self.down(normed_BTD.to(self.down.weight.dtype)))

    def forward(self, normed_BTD: Tensor, *summary: Tensor) -> Tensor:
        """Return y, (B, T, D)."""
        bottleneck_BTR = self.bottleneck(normed_BTD, *summary)
        first_B11, second_B11 = summary[0][:, None, :].chunk(2, dim=-1)
        mixed_BTD: Tensor = first_B11 * self.first(bottleneck_BTR) + second_B11 * self.second(bottleneck_BTR)
        return normed_BTD + (self.scale * mixed_BTD).to(normed_BTD.dtype)


class Pia(Adapter):
    """A skipped layer's adapter: y = x + s (w0 B + w1 D)((C x + z) / 2), where z is the mean of A x.

    C is `down`, A `context`.
    """

    def __init__(self, width: int, rank: int, shape: Shape) -> None:
        super().__init__(width, rank, shape)
        self.context = _down(width, rank)

    def summary(self, mean_BD: Tensor) -> tuple[Tensor, ...]:
        """Return the routing weights (B, 2) and z (B, R): A is affine, so the mean can be taken before it."""
        return (*super().summary(mean_BD), self.context(mean_BD.to(self.down.weight.dtype)))

    def bottleneck(self, normed_BTD: Tensor, *summary: Tensor) -> Tensor:
        """Return (C x + z) / 2."""
        return (super().bottleneck(normed_BTD) + summary[1][:, None]) / 2


class Adapters(Parts):
    """The adapters of a model's layers."""

    kind: ClassVar[PartsKind] = PartsKind.EAS
    settings: EasSettings

    def __init__(self, settings: EasSettings, width: int) -> None:
        super().__init__(settings)
        self.kept = nn.ModuleDict({str(layer): Adapter(width, settings.kept_rank, settings) for layer in settings.kept})
        self.skipped = nn.ModuleDict(
            {str(layer): Pia(width, settings.pia_rank, settings) for layer in settings.skipped}
        )
        for pia in self.skipped.values() if settings.start == "xavier" else ():
            nn.init.xavier_uniform_(cast(Pia, pia).first.weight)
            nn.init.xavier_uniform_(cast(Pia, pia).second.weight)
        self.derived: dict[int, tuple[Any, Any]] = {}
        """What an executor has computed from a PIA's weights, with the state of the weights that it used."""

    @classmethod
    def build(cls, decoder: Decoder, settings: EasSettings) -> Self:
        """Make fresh adapters. Raises Refused for a family without a plain gated FFN, or layers that do not exist."""
        check_family(decoder)
        outside = [layer for layer in (*settings.kept, *settings.skipped) if layer >= len(decoder.layers)]
        if outside:
            raise Refused(f"layer {outside[0]} does not exist: the model has {len(decoder.layers)}; correct the list")
        width = int(decoder.config.get_text_config().hidden_size)
        if width % settings.groups:
            raise Refused(f"{settings.groups} groups do not divide the model's width of {width}; choose another number")
        return cls(settings, width)

    def place(self, decoder: Decoder) -> None:
        """Move each adapter to its layer's device."""
        for adapters in (self.kept, self.skipped):
            for layer, adapter in adapters.items():
                adapter.to(decoder.device(decoder.layers[int(layer)]))

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """Return how many weights meet each token: kept layers' adapters, and PIAs folded into the FFN."""
        own, width, ffn = self.settings, architecture.hidden_size, architecture.intermediate_size
        kept = width * own.kept_rank + 2 * width * own.kept_rank // own.groups
        folded = width * own.pia_rank + 2 * ffn * (2 * own.pia_rank + 2)
        return {"adapter_weights": len(own.kept) * kept + len(own.skipped) * folded}


def check_family(decoder: Decoder) -> None:
    """Raise Refused unless adapters can be folded into the model's FFN: a gated one, without a norm behind it."""
    ffn = decoder.ffn(decoder.layers[0])
    if decoder.parts.ffn_post_norm is not None:
        raise Refused(
            f"EAS is not defined for {decoder.family.label}: its layers normalise the FFN's output before adding it; "
            "use a model with a Llama, Mistral or Qwen decoder"
        )
    missing = [name for name in _FFN if not hasattr(ffn, name)]
    if missing:
        raise Refused(
            f"EAS folds its adapters into a gated FFN, and that of {decoder.family.label}, {type(ffn).__name__}, has "
            f"no {missing[0]}; use a model with a Llama, Mistral or Qwen decoder"
        )


def _down(width: int, rank: int) -> nn.Linear:
    projection = nn.Linear(width, rank)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection
