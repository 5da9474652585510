"""DyVTE's routers: after each layer, do the text tokens of a sample still need its visual tokens? (arXiv 2411.19628)

Shapes: B batch, T positions, M averaged text rows, N rows of all samples, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.families.parts.base import Parts
from shortv.families.tokens import Selection, TokenTypes, last_true
from shortv.plan import PartsKind

STAY, EXIT = 0, 1
"""The two classes of a router."""
MeanOver = Literal["after-image", "all-text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """What routers look at and how wide they are.

    `mean_over` says which text states are averaged, the last one apart: those after the last image (the released code,
    and the default, since text before an image cannot have read it) or all of the prompt (the paper's formula).
    """

    width: int = 2048
    mean_over: MeanOver = "after-image"

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise Refused(f"the routers' width is {self.width!r}; give a whole number of at least 1")
        if self.mean_over not in get_args(MeanOver):
            raise Refused(f"routers cannot average {self.mean_over!r}; choose one of {', '.join(get_args(MeanOver))}")


class Router(nn.Module):
    """softmax(GELU([mean of text states; last text state] W1) W2), without biases."""

    def __init__(self, hidden_size: int, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * hidden_size, width, bias=False, device=device)
        self.outer = nn.Linear(width, 2, bias=False, device=device)
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, state_BE: Tensor) -> Tensor:
        """Logits (B, 2) of STAY and EXIT, in float32 whatever dtype the weights have; E is twice the model's width."""
        # Residual streams have entries in the thousands: in half precision a decision would be a matter of rounding.
        inner_BW = linear(state_BE.to(self.inner.weight.device, torch.float32), self.inner.weight.float())
        return linear(nn.functional.gelu(inner_BW), self.outer.weight.float())


class ExitRouters(Parts):
    """One router per decoder layer, not shared (`reference/dyvte.md`, section 2)."""

    kind: ClassVar[PartsKind] = PartsKind.DYVTE
    reads_prompt: ClassVar[bool] = True
    settings: RouterSettings

    def __init__(
        self, num_layers: int, hidden_size: int, settings: RouterSettings, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.routers = nn.ModuleList(Router(hidden_size, settings.width, device) for _ in range(num_layers))

    @classmethod
    def build(cls, decoder: Decoder, settings: RouterSettings) -> Self:
        """Make routers for a model.

        Raises:
            Refused: a family whose visual tokens cannot leave sample by sample.
        """
        check_can_exit(decoder)
        width = int(decoder.config.get_text_config().hidden_size)
        return cls(len(decoder.layers), width, settings, decoder.device(decoder.layers[0]))

    @classmethod
    def parse_settings(cls, content: dict[str, Any]) -> RouterSettings:
        """Read settings from the JSON beside the weights. Raises Refused."""
        unknown = sorted(content.keys() - {entry.name for entry in fields(RouterSettings)})
        if unknown:
            raise Refused(f"routers have no setting {unknown[0]!r}; train the parts again with this version")
        return RouterSettings(**content)

    def exit_probability(self, layer: int, state_BE: Tensor) -> Tensor:
        """Probability (B,) that visual tokens may leave after that layer, in float32 on the state's device."""
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
    """Which text positions (B, T) a router averages: never the last, unless it is the only one."""
    positions_T = torch.arange(types.text_BT.shape[1], device=types.text_BT.device)
    last_BT = positions_T == last_true(types.text_BT)[:, None]
    earlier_BT = types.text_BT & ~last_BT
    if mean_over == "after-image":
        # Several images: what follows the last one has read them all.
        earlier_BT = earlier_BT & (positions_T > last_true(types.visual_BT)[:, None])
    return torch.where(earlier_BT.any(1, keepdim=True), earlier_BT, last_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """Where the text that routers look at stands among the rows of a batch, laid one after the other."""

    index_BM: Tensor
    """Averaged rows, filled up with any row."""
    share_BM: Tensor
    """Their weight in the mean, 0 where filled up."""
    last_B: Tensor
    """The last text row of each sample."""

    @classmethod
    def of(cls, types: TokenTypes, mean_over: MeanOver, *, width: int | None = None) -> TextRows:
        """Find them among all rows (B * T) of a forward. `width` is M where it is known, which saves asking for it."""
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
        """The same when of all rows only these are left, in their order."""
        place_R = kept_BT.flatten().cumsum(0) - 1
        # What fills up may be gone; it weighs nothing wherever it points.
        index_BM = place_R[self.index_BM].clamp(min=0)
        return TextRows(index_BM=index_BM, share_BM=self.share_BM, last_B=place_R[self.last_B])

    def state(self, rows_ND: Tensor) -> Tensor:
        """What a router reads, (B, 2 D) in float32: mean of the averaged rows, then the last row."""
        index_BM, share_BM, last_B = (part.to(rows_ND.device) for part in (self.index_BM, self.share_BM, self.last_B))
        # Rows of padding may hold anything, NaN included.
        averaged_BMD = rows_ND[index_BM].float().masked_fill(share_BM[:, :, None] == 0, 0)
        mean_BD = (averaged_BMD * share_BM[:, :, None]).sum(1)
        return torch.cat([mean_BD, rows_ND[last_B].float()], dim=1)
