"""Rows of a padded batch: attention masks, selected positions of each sample, and their flat form without padding.

Shapes: B batch, T positions, S selected rows of a sample (packed), N selected rows of all samples, Q query positions,
K key positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def explicit_mask(mask: Tensor | None, *, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the 4D mask that an attention call obeys.

    transformers passes None for the plain causal mask (the last key belongs to the last query). A 4D mask, boolean
    (True: may attend) or additive, is returned as it is.
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
    """Return a 4D mask as booleans: True where the query may attend to the key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def restricted(mask: Tensor, allowed: Tensor) -> Tensor:
    """Return a 4D mask, boolean or additive, without the pairs of query and key that are not allowed."""
    if mask.dtype == torch.bool:
        return allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def hide_keys(mask: Tensor, hidden_BK: Tensor) -> Tensor:
    """Hide some keys in a 4D mask from every query that keeps another key.

    A query without another key (a hidden token before the first text token, padding) keeps its row of the mask: a
    softmax over nothing is NaN, and nothing reads what such a query gets.
    """
    allowed_BHQK = may_attend(mask)
    narrowed_BHQK = allowed_BHQK & ~hidden_BK[:, None, None, :]
    return restricted(mask, torch.where(narrowed_BHQK.any(-1, keepdim=True), narrowed_BHQK, allowed_BHQK))


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
            width: the largest count of a row, where it is known; computing it waits for the device.
        """
        counts_B = mask_BT.sum(1)
        width = int(counts_B.max()) if width is None else width
        index_BS = mask_BT.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid_BS = torch.arange(width, device=mask_BT.device) < counts_B[:, None]
        return cls(index_BS=index_BS, valid_BS=valid_BS)

    def of_rows(self, rows_R: Tensor) -> Selection:
        """The selection of some of the samples."""
        return Selection(index_BS=self.index_BS[rows_R], valid_BS=self.valid_BS[rows_R])

    def rows(self, values_BT: Tensor) -> Tensor:
        """Gather the selected positions of (B or 1, T, ...) values into (B, S, ...)."""
        index_BS = self.index_BS.to(values_BT.device)
        return values_BT.take_along_dim(index_BS[(..., *[None] * (values_BT.dim() - 2))], dim=1)

    def queries(self, mask_BHTT: Tensor) -> Tensor:
        """Gather the selected rows of a 4D mask, with all columns: (B, H, S, T)."""
        return mask_BHTT.take_along_dim(self.index_BS.to(mask_BHTT.device)[:, None, :, None], dim=2)

    def square(self, mask_BHTT: Tensor) -> Tensor:
        """Gather the selected rows and columns of a 4D mask, (B, H, S, S); padding attends to itself alone."""
        mask = self.queries(mask_BHTT)
        mask = mask.take_along_dim(self.index_BS.to(mask.device)[:, None, None, :], dim=3)
        valid_BS = self.valid_BS.to(mask.device)
        own_BHSS = torch.eye(len(valid_BS[0]), dtype=torch.bool, device=mask.device) & ~valid_BS[:, None, :, None]
        both_BHSS = valid_BS[:, None, None, :] & valid_BS[:, None, :, None]
        restricted_BHSS = restricted(mask, may_attend(mask) & both_BHSS)
        # "May attend" is True in a boolean mask, and 0 in an additive one.
        return restricted_BHSS.masked_fill(own_BHSS, mask.dtype == torch.bool)


class Split:
    """The rows of one forward that a mode updates.

    Norms, projections and FFN take the rows of all samples flat, without padding; attention takes them by sample,
    padded. Layers of one kind receive the same mask and position tensors, so what is gathered from these is cached by
    identity for the forward.
    """

    def __init__(self, updated_BT: Tensor, *, counts: Sequence[int] | None = None) -> None:
        """Split a forward's rows.

        Args:
            counts: updated rows of each sample, where they are known; computing them waits for the device.
        """
        self.updated = Selection.of(updated_BT, width=max(counts) if counts else None)
        self._batch, self._length = updated_BT.shape
        self._place_N = _true_places(updated_BT, counts)
        """Place of each updated row among all rows of the batch."""
        self._slot_N = _true_places(self.updated.valid_BS, counts)
        """Its place among the packed rows of all samples."""
        self._cache: dict[tuple[str, int], tuple[object, Tensor]] = {}

    @property
    def padded(self) -> bool:
        """Whether samples differ in how many rows are updated."""
        return len(self._slot_N) != self.updated.index_BS.numel()

    def flat(self, rows_BTD: Tensor) -> Tensor:
        """The updated rows of all samples, one after the other: (1, N, D)."""
        return rows_BTD.flatten(0, 1).index_select(0, self._place_N.to(rows_BTD.device))[None]

    def put(self, rows_BTD: Tensor, updated_1ND: Tensor, *, in_place: bool = False) -> Tensor:
        """Return all rows, the updated ones replaced by their new values.

        Args:
            in_place: write into `rows_BTD`, unless gradients are recorded.
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
        return self._cached("rows", mask, lambda: self.updated.queries(self._explicit(mask, device)))

    def mask_square(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Updated rows and columns of the model's own mask: (B, 1, S, S); None where that is plainly causal again."""
        if mask is None and not self.padded:
            return None
        return self._cached("square", mask, lambda: self.updated.square(self._explicit(mask, device)))

    def updated_rows(self, values_BTD: Tensor) -> Tensor:
        """Return the updated rows of position embeddings."""
        return self._cached("values", values_BTD, lambda: self.updated.rows(values_BTD))

    def _explicit(self, mask: Tensor | None, device: torch.device) -> Tensor:
        return explicit_mask(mask, batch=self._batch, queries=self._length, keys=self._length, device=device)

    def _cached(self, kind: str, source: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        # The source is cached beside the result, so that no other tensor gets its id.
        key = (kind, id(source))
        if key not in self._cache:
            self._cache[key] = (source, make())
        return self._cache[key][1]


def _true_places(mask_BT: Tensor, counts: Sequence[int] | None) -> Tensor:
    flat = mask_BT.flatten()
    if counts is None:
        return flat.nonzero().squeeze(1)
    # The size of a slice of a sorted tensor is known, while nonzero waits for the device to count.
    return flat.int().argsort(descending=True, stable=True)[: sum(counts)]
