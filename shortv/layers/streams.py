"""The rows of one forward, split into those that a mode updates and those that it leaves alone.

Shapes: B batch, T positions, S updated rows (packed), R resting rows (packed), K keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shortv.tokens import Selection, explicit_mask


class Split:
    """Updated and resting rows of one forward; what is gathered for one layer serves the others.

    Layers of one kind are called with the same mask and position tensors, so gathered ones are kept by identity for
    the length of the forward.
    """

    def __init__(self, updated_BT: Tensor, resting_BT: Tensor) -> None:
        self.updated = Selection.of(updated_BT)
        self.resting = Selection.of(resting_BT)
        # Where each position's row is found in [updated rows, resting rows].
        width = self.updated.index_BS.shape[1]
        batch, length = updated_BT.shape
        self.origin_BT = torch.zeros(batch, length, dtype=torch.long, device=updated_BT.device)
        _place(self.origin_BT, self.updated, 0)
        _place(self.origin_BT, self.resting, width)
        self._kept: dict[tuple[str, int], tuple[object, Tensor]] = {}

    def positions(self, updated: Tensor, resting: Tensor) -> Tensor:
        """Put packed rows of both kinds back in order along axis -2: (..., S, X) and (..., R, X) to (..., T, X)."""
        packed = torch.cat([updated, resting], dim=-2)
        index = self.origin_BT.to(packed.device)
        index = index.view(len(index), *[1] * (packed.dim() - 3), -1, 1)
        return packed.gather(-2, index.expand(*packed.shape[:-2], -1, packed.shape[-1]))

    def mask_rows(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """The updated rows of the model's own mask, all columns: (B, 1, S, T)."""
        return self._keep("rows", mask, lambda: _rows(self.updated, self._explicit(mask, device)))

    def mask_square(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """Updated rows and columns of the model's own mask: (B, 1, S, S)."""
        return self._keep("square", mask, lambda: self.updated.square(self._explicit(mask, device)))

    def updated_rows(self, values_BTD: Tensor) -> Tensor:
        """Updated rows of position embeddings, kept by identity."""
        return self._keep("values", values_BTD, lambda: self.updated.rows(values_BTD))

    def _explicit(self, mask: Tensor | None, device: torch.device) -> Tensor:
        batch, length = self.origin_BT.shape
        return explicit_mask(mask, batch=batch, queries=length, keys=length, device=device)

    def _keep(self, kind: str, source: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        # The source is kept beside what was made of it, so that its id cannot be given to another tensor.
        key = (kind, id(source))
        if key not in self._kept:
            self._kept[key] = (source, make())
        return self._kept[key][1]


def _rows(selection: Selection, mask_BHTT: Tensor) -> Tensor:
    index_BS = selection.index_BS.to(mask_BHTT.device)
    batch, width = index_BS.shape
    mask = mask_BHTT.expand(batch, -1, -1, -1)
    return mask.gather(2, index_BS[:, None, :, None].expand(-1, mask.shape[1], width, mask.shape[3]))


def _place(origin_BT: Tensor, selection: Selection, offset: int) -> None:
    row_BS, column_BS = selection.valid_BS.nonzero(as_tuple=True)
    origin_BT[row_BS, selection.index_BS[row_BS, column_BS]] = column_BS + offset
