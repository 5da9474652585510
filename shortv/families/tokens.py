"""What each position of a padded batch holds: padding, text or a visual token.

All code that selects rows uses these masks; the offset of an image is assumed nowhere. Shapes: B batch, T positions.
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

    def on(self, device: torch.device) -> TokenTypes:
        """Return the same masks on a device."""
        return TokenTypes(visual_BT=self.visual_BT.to(device), text_BT=self.text_BT.to(device))

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
