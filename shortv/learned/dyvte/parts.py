"""DyVTE's routers: after each layer, do the text tokens of a sample still need its visual tokens?

Shapes: B batch, T positions, M averaged text rows, N rows of all samples, D width, E twice the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.families.tokens import TokenTypes, last_true
from shortv.layers.rows import Selection
from shortv.learned.base import DecidingLinear, Parts
from shortv.learned.dyvte.recipe import MeanOver, RouterSettings
from shortv.plan import PartsKind

STAY, EXIT = 0, 1
"""The two classes of a router."""


class Router(nn.Module):
    """softmax(GELU([mean of text states; last text state] W1) W2), without biases, in float32."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.inner = DecidingLinear(2 * hidden_size, width, bias=False)
        self.outer = DecidingLinear(width, 2, bias=False)
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, state_BE: Tensor) -> Tensor:
        """Return logits (B, 2) of STAY and EXIT."""
        state_BE = state_BE.to(self.inner.weight.device, torch.float32)
        inner_BW = gelu(linear(state_BE, self.inner.weight.float()))
        return linear(inner_BW, self.outer.weight.float())


class ExitRouters(Parts):
    """One router per decoder layer, not shared (released code)."""

    kind: ClassVar[PartsKind] = PartsKind.DYVTE
    settings: RouterSettings

    def __init__(self, num_layers: int, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__(settings)
        self.routers = nn.ModuleList(Router(hidden_size, settings.width) for _ in range(num_layers))

    @classmethod
    def build(cls, decoder: Decoder, settings: RouterSettings) -> Self:
        """Make routers for a model. Raises Refused for a family whose visual tokens cannot leave sample by sample."""
        check_can_exit(decoder)
        return cls(len(decoder.layers), int(decoder.config.get_text_config().hidden_size), settings)

    def place(self, decoder: Decoder) -> None:
        """Move all routers to the first layer's device."""
        self.to(decoder.device(decoder.layers[0]))

    def exit_probability(self, layer: int, state_BE: Tensor) -> Tensor:
        """Return the probability (B,) that visual tokens may leave after a layer, in float32 on the state's device."""
        logits_B2: Tensor = self.routers[layer](state_BE)
        return logits_B2.softmax(-1)[:, EXIT].to(state_BE.device)


def check_can_exit(decoder: Decoder) -> None:
    """Raise Refused for a model whose visual tokens cannot leave sample by sample."""
    if decoder.num_deepstack:
        raise Refused(
            f"DyVTE does not run on {decoder.family.label}: its first layers add vision features to the visual rows, "
            "wherever those are; use a model without DeepStack"
        )
    if any(getattr(decoder.attention(layer), "sliding_window", None) for layer in decoder.layers):
        raise Refused(
            f"DyVTE does not run on this {decoder.family.label} model: its sliding windows count positions, and "
            "samples would differ in which are left; use a model without sliding windows"
        )


def averaged(types: TokenTypes, mean_over: MeanOver) -> Tensor:
    """Return which text positions (B, T) a router averages: never the last, unless it is the only one."""
    positions_T = torch.arange(types.text_BT.shape[1], device=types.text_BT.device)
    last_BT = positions_T == last_true(types.text_BT)[:, None]
    earlier_BT = types.text_BT & ~last_BT
    if mean_over == "after-image":
        # Of several images: text after the last one has read them all.
        earlier_BT = earlier_BT & (positions_T > last_true(types.visual_BT)[:, None])
    return torch.where(earlier_BT.any(1, keepdim=True), earlier_BT, last_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """Where the text that routers read stands among the rows of a batch, one sample's after the other's."""

    index_BM: Tensor
    """Averaged rows, padded with any row."""
    share_BM: Tensor
    """Their weight in the mean, 0 for padding."""
    last_B: Tensor
    """The last text row of each sample."""

    @classmethod
    def of(cls, types: TokenTypes, mean_over: MeanOver, *, width: int | None = None) -> TextRows:
        """Find them among all rows (B * T) of a forward; a known `width` M saves waiting for the device."""
        packed = Selection.of(averaged(types, mean_over), width=width)
        batch, length = types.text_BT.shape
        start_B = torch.arange(batch, device=types.text_BT.device) * length
        count_B1 = packed.valid_BS.sum(1, keepdim=True)
        return cls(
            index_BM=packed.index_BS + start_B[:, None],
            share_BM=packed.valid_BS.float() / count_B1,
            last_B=last_true(types.text_BT) + start_B,
        )

    def among(self, kept_BT: Tensor) -> TextRows:
        """Return where the rows stand when of all rows only `kept_BT` are left, in their order."""
        place_R = kept_BT.flatten().cumsum(0) - 1
        # Padding may point to a row that is gone; its weight is 0.
        index_BM = place_R[self.index_BM].clamp(min=0)
        return TextRows(index_BM=index_BM, share_BM=self.share_BM, last_B=place_R[self.last_B])

    def state(self, rows_ND: Tensor) -> Tensor:
        """Return what a router reads, (B, E) in float32: the mean of the averaged rows, then the last row."""
        index_BM, share_BM, last_B = (part.to(rows_ND.device) for part in (self.index_BM, self.share_BM, self.last_B))
        # Rows of padding may hold anything, NaN included.
        averaged_BMD = rows_ND[index_BM].float().masked_fill(share_BM[:, :, None] == 0, 0)
        mean_BD = (averaged_BMD * share_BM[:, :, None]).sum(1)
        return torch.cat([mean_BD, rows_ND[last_B].float()], dim=1)
