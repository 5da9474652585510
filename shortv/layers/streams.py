"""The rows of one forward, split into those that a mode updates and those that it leaves alone.

Shapes: B batch, T positions, S updated rows (packed), N updated rows of all samples, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shortv.tokens import Selection, explicit_mask


class Split:
    """The rows of one forward that a mode updates, packed; what is gathered for one layer serves the others.

    Layers of one kind are called with the same mask and position tensors, so gathered ones are kept by identity for
    the length of the forward.
    """

    def __init__(self, updated_BT: Tensor) -> None:
        self.updated = Selection.of(updated_BT)
        self._shape = updated_BT.shape
        self._place_N = updated_BT.flatten().nonzero().squeeze(1)
        """Where each updated row stands among all rows of the batch."""
        self._slot_N = self.updated.valid_BS.flatten().nonzero().squeeze(1)
        """Where it stands among the packed ones, which are padded to the longest sample."""
        self._kept: dict[tuple[str, int], tuple[object, Tensor]] = {}

    def put(self, rows_BTD: Tensor, updated_BSD: Tensor, *, in_place: bool = False) -> Tensor:
        """All rows, the updated ones replaced by their new values.

        `in_place` writes into `rows_BTD`, where no gradient needs what stood there.
        """
        updated_ND = updated_BSD.flatten(0, 1)
        if len(self._slot_N) != len(updated_ND):
            updated_ND = updated_ND[self._slot_N.to(updated_ND.device)]
        place_N = self._place_N.to(rows_BTD.device)
        flat = rows_BTD.flatten(0, 1)
        if in_place and not torch.is_grad_enabled():
            flat = flat.index_copy_(0, place_N, updated_ND)
        else:
            flat = flat.index_copy(0, place_N, updated_ND)
        return flat.view_as(rows_BTD)

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
        batch, length = self._shape
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
