"""The rows of one forward, split into those that a mode updates and those that it leaves alone.

Shapes: B batch, T positions, S updated rows (packed), N updated rows of all samples, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shortv.families.tokens import Selection, explicit_mask


class Split:
    """The rows of one forward that a mode updates; what is gathered for one layer serves the others.

    Norms, projections and FFN take them flat, without padding, whatever sample they belong to; attention takes them
    by sample, padded. Layers of one kind are called with the same mask and position tensors, so gathered ones are kept
    by identity for the length of the forward.
    """

    def __init__(self, updated_BT: Tensor, *, counts: Sequence[int] | None = None) -> None:
        """Split a forward's rows. `counts` are the updated ones of each sample: known, no device is waited for."""
        self.updated = Selection.of(updated_BT, width=max(counts) if counts else None)
        self._batch, self._length = updated_BT.shape
        self._place_N = _true_places(updated_BT, counts)
        """Where each updated row stands among all rows of the batch."""
        self._slot_N = _true_places(self.updated.valid_BS, counts)
        """Where it stands among the padded ones."""
        self._kept: dict[tuple[str, int], tuple[object, Tensor]] = {}

    @property
    def padded(self) -> bool:
        """Whether samples differ in how many rows are updated."""
        return len(self._slot_N) != self.updated.index_BS.numel()

    def flat(self, rows_BTD: Tensor) -> Tensor:
        """The updated rows of all samples, one after the other: (1, N, D)."""
        return rows_BTD.flatten(0, 1).index_select(0, self._place_N.to(rows_BTD.device))[None]

    def put(self, rows_BTD: Tensor, updated_1ND: Tensor, *, in_place: bool = False) -> Tensor:
        """All rows, the updated ones replaced by their new values.

        `in_place` writes into `rows_BTD`, where no gradient needs what stood there.
        """
        rows = rows_BTD.flatten(0, 1)
        place_N = self._place_N.to(rows.device)
        if in_place and not torch.is_grad_enabled():
            rows = rows.index_copy_(0, place_N, updated_1ND[0])
        else:
            rows = rows.index_copy(0, place_N, updated_1ND[0])
        return rows.view_as(rows_BTD)

    def by_sample(self, flat_1HNC: Tensor) -> Tensor:
        """Heads of flat rows (1, H, N, C) as those of padded samples (B, H, S, C)."""
        rows_NHC = flat_1HNC[0].transpose(0, 1)
        if self.padded:
            slots = rows_NHC.new_zeros(self.updated.index_BS.numel(), *rows_NHC.shape[1:])
            rows_NHC = slots.index_copy(0, self._slot_N.to(slots.device), rows_NHC)
        return rows_NHC.view(self._batch, -1, *rows_NHC.shape[1:]).transpose(1, 2)

    def flattened(self, rows_BSD: Tensor) -> Tensor:
        """Padded rows of each sample (B, S, D) as flat ones (1, N, D)."""
        rows = rows_BSD.flatten(0, 1)
        return (rows.index_select(0, self._slot_N.to(rows.device)) if self.padded else rows)[None]

    def is_less_work(self, mask: Tensor | None, width: int) -> bool:
        """Whether attending from the updated rows alone costs less than from all rows with the model's own kernel.

        Without a mask that kernel is causal and leaves out half of the scores; `width` is that of a row. Per unit of
        head width, the query and output projections take 4 FLOPs per row and width, the scores 4 per query and key.
        """
        if mask is not None:
            return True
        queries, keys = self.updated.index_BS.shape[1], self._length
        ours = 4 * width * len(self._slot_N) + 4 * self._batch * queries * keys
        return ours < 4 * width * self._batch * keys + 2 * self._batch * keys**2

    def mask_rows(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """The updated rows of the model's own mask, all columns: (B, 1, S, T)."""
        return self._keep("rows", mask, lambda: _rows(self.updated, self._explicit(mask, device)))

    def mask_square(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Updated rows and columns of the model's own mask: (B, 1, S, S); None where that is plainly causal again."""
        if mask is None and not self.padded:
            return None
        return self._keep("square", mask, lambda: self.updated.square(self._explicit(mask, device)))

    def updated_rows(self, values_BTD: Tensor) -> Tensor:
        """Updated rows of position embeddings, kept by identity."""
        return self._keep("values", values_BTD, lambda: self.updated.rows(values_BTD))

    def _explicit(self, mask: Tensor | None, device: torch.device) -> Tensor:
        return explicit_mask(mask, batch=self._batch, queries=self._length, keys=self._length, device=device)

    def _keep(self, kind: str, source: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        # The source is kept beside what was made of it, so that its id cannot be given to another tensor.
        key = (kind, id(source))
        if key not in self._kept:
            self._kept[key] = (source, make())
        return self._kept[key][1]


def _true_places(mask_BT: Tensor, counts: Sequence[int] | None) -> Tensor:
    flat = mask_BT.flatten()
    if counts is None:
        return flat.nonzero().squeeze(1)
    # Sorting finds as many as it is asked for, while nonzero has to report how many there are.
    return flat.int().argsort(descending=True, stable=True)[: sum(counts)]


def _rows(selection: Selection, mask_BHTT: Tensor) -> Tensor:
    index_BS = selection.index_BS.to(mask_BHTT.device)
    batch, width = index_BS.shape
    mask = mask_BHTT.expand(batch, -1, -1, -1)
    return mask.gather(2, index_BS[:, None, :, None].expand(-1, mask.shape[1], width, mask.shape[3]))
