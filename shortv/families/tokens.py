"""What stands at each position of a padded batch: padding, text or a visual token.

Everything in this project that selects rows does it through these masks; no offset of an image is assumed anywhere.
Shapes: B batch, T positions, Q query positions, K key positions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from shortv.plan import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTypes:
    """Two disjoint boolean masks over a padded batch; a position in neither is padding."""

    visual_BT: Tensor
    text_BT: Tensor

    @property
    def real_BT(self) -> Tensor:
        """Every position that is not padding."""
        return self.visual_BT | self.text_BT

    def among(self, tokens: Tokens) -> Tensor:
        """Positions of these tokens."""
        return self.real_BT & ((Tokens.TEXT in tokens) | self.visual_BT) & ((Tokens.VISUAL in tokens) | self.text_BT)

    @property
    def last_B(self) -> Tensor:
        """Index of each sample's last position that is not padding: where the next token is predicted."""
        return last_true(self.real_BT)

    @property
    def n_text(self) -> list[int]:
        """Text tokens per sample."""
        return [int(n) for n in self.text_BT.sum(1).tolist()]

    @property
    def n_visual(self) -> list[int]:
        """Visual tokens per sample."""
        return [int(n) for n in self.visual_BT.sum(1).tolist()]


def token_types(input_ids_BT: Tensor, attention_mask_BT: Tensor | None, visual_ids: Collection[int]) -> TokenTypes:
    """Tell visual tokens, text and padding apart by the placeholder ids that the vision tower's features replace."""
    visual_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for placeholder in visual_ids:
        visual_BT |= input_ids_BT == placeholder
    if attention_mask_BT is None:
        return TokenTypes(visual_BT=visual_BT, text_BT=~visual_BT)
    real_BT = attention_mask_BT.to(input_ids_BT.device).bool()
    return TokenTypes(visual_BT=visual_BT & real_BT, text_BT=~visual_BT & real_BT)


def last_true(mask_BT: Tensor) -> Tensor:
    """Index of the last True of each row, shape (B,)."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (mask_BT * (positions_T + 1)).argmax(1)


def explicit_mask(mask: Tensor | None, *, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The 4D mask that an attention call obeys, spelled out where the model passed None.

    transformers passes None when the mask is the plain causal one (keys end where queries end); a 4D mask, boolean
    (True = may attend) or additive float, is returned as it is.
    """
    if mask is None:
        causal_QK = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return causal_QK.expand(batch, 1, queries, keys)
    if mask.dim() != 4:
        raise TypeError(
            f"an attention mask of {mask.dim()} dimensions has no rows to select; use sdpa or eager attention"
        )
    return mask


def may_attend(mask: Tensor) -> Tensor:
    """A 4D mask as booleans: True where the query may attend to the key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def hide_keys(mask: Tensor, hidden_BK: Tensor) -> Tensor:
    """Close the columns of some keys in a 4D mask, for every query that keeps another key to look at.

    A query left without any key (the hidden tokens themselves before the first text token, padding) keeps its row:
    softmax over nothing would be NaN, and those rows are read by nobody.
    """
    allowed_BHQK = may_attend(mask)
    narrowed_BHQK = allowed_BHQK & ~hidden_BK[:, None, None, :]
    narrowed_BHQK = torch.where(narrowed_BHQK.any(-1, keepdim=True), narrowed_BHQK, allowed_BHQK)
    return _like(mask, narrowed_BHQK)


def _like(mask: Tensor, allowed_BHQK: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return allowed_BHQK
    return torch.where(allowed_BHQK, mask.expand_as(allowed_BHQK), torch.finfo(mask.dtype).min)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Some positions of each sample, packed to the front of a narrower batch and padded on the right."""

    index_BS: Tensor
    """Original position of each packed row; padding repeats a position and is marked in `valid_BS`."""
    valid_BS: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor, *, width: int | None = None) -> Selection:
        """Select the True positions of each row, in order.

        Args:
            width: the most positions of a row, where it is known; without it the device has to be waited for.
        """
        counts_B = mask_BT.sum(1)
        width = int(counts_B.max()) if width is None else width
        index_BS = mask_BT.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid_BS = torch.arange(width, device=mask_BT.device) < counts_B[:, None]
        return cls(index_BS=index_BS, valid_BS=valid_BS)

    def of_rows(self, rows_R: Tensor) -> Selection:
        """The selection of some of the samples."""
        return Selection(index_BS=self.index_BS[rows_R], valid_BS=self.valid_BS[rows_R])

    def rows(self, values_BTD: Tensor) -> Tensor:
        """Gather the selected rows of (B or 1, T, D) values into (B, S, D)."""
        values_BTD = values_BTD.expand(self.index_BS.shape[0], -1, -1)
        index_BS = self.index_BS.to(values_BTD.device)
        return values_BTD.gather(1, index_BS[:, :, None].expand(-1, -1, values_BTD.shape[2]))

    def columns(self, values_BT: Tensor) -> Tensor:
        """Gather (B or 1, T) values into (B, S)."""
        return values_BT.expand(self.index_BS.shape[0], -1).gather(1, self.index_BS)

    def square(self, mask_BHTT: Tensor) -> Tensor:
        """Rows and columns of a 4D mask that belong to the selection; padding is seen by nobody but itself."""
        batch, width = self.index_BS.shape
        index = self.index_BS[:, None, :, None].to(mask_BHTT.device)
        heads = mask_BHTT.shape[1]
        mask = mask_BHTT.expand(batch, -1, -1, -1)
        mask = mask.gather(2, index.expand(batch, heads, width, mask.shape[3]))
        mask = mask.gather(3, index.transpose(2, 3).expand(batch, heads, width, width))
        own_SS = torch.eye(width, dtype=torch.bool, device=mask.device)
        valid_BS = self.valid_BS.to(mask.device)
        allowed = may_attend(mask) & valid_BS[:, None, None, :] & valid_BS[:, None, :, None]
        allowed = allowed | (own_SS & ~valid_BS[:, None, :, None])
        if mask.dtype == torch.bool:
            return allowed
        return torch.zeros_like(mask).masked_fill(~allowed, torch.finfo(mask.dtype).min)
