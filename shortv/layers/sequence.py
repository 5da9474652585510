"""What stands where in the sequences that a model is working on, from prefill through decoding.

Both executors follow it; neither asks the cache of a layer that a plan may shorten.
Shapes: B batch, T positions of this forward, K positions so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shortv.errors import ShortVError
from shortv.families import Decoder
from shortv.tokens import TokenTypes, explicit_mask, may_attend, token_types


class SequenceState:
    """Token types of the current forward and of everything before it, seen by a pre-hook on the whole model."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.types = TokenTypes(visual_BT=torch.empty(0), text_BT=torch.empty(0))
        self.visual_BK = torch.empty(0, 0, dtype=torch.bool)
        self.past = 0
        """Positions before this forward."""
        self.has_visual = False
        """Whether this forward brings visual tokens."""

    def observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model.

        Raises:
            ShortVError: no `input_ids`, or a cache filled outside of the plan.
        """
        input_ids_BT = args[0] if args else kwargs.get("input_ids")
        if input_ids_BT is None:
            raise ShortVError("this forward has no input_ids, so visual tokens cannot be told apart; pass input_ids")
        mask_BK = _key_mask(kwargs.get("attention_mask"))
        mask_BT = None if mask_BK is None else mask_BK[:, -input_ids_BT.shape[1] :]
        self.types = token_types(input_ids_BT, mask_BT, self._decoder.visual_ids)
        cache = kwargs.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        # One look at the tokens per prompt; a single token after a prompt is a generated one, and that is text.
        self.has_visual = (self.past == 0 or input_ids_BT.shape[1] > 1) and bool(self.types.visual_BT.any())
        if self.past == 0:
            self.visual_BK = self.types.visual_BT
        elif self.visual_BK.shape == (len(input_ids_BT), self.past):
            self.visual_BK = torch.cat([self.visual_BK, self.types.visual_BT], dim=1)
        else:
            raise ShortVError(
                f"the cache holds {self.past} positions of {len(input_ids_BT)} sequences, but the plan has seen "
                f"{tuple(self.visual_BK.shape)}; prefill inside the plan's context"
            )

    def mask_of(self, attention: nn.Module, mask: Tensor | None, device: torch.device) -> Tensor:
        """The 4D mask that one layer's attention obeys in this forward; its columns are the last positions so far.

        A sliding layer's cache ends at its window, so where such a layer is given no mask it sees that window.
        """
        batch, queries = self.types.text_BT.shape
        keys = self.visual_BK.shape[1]
        window = getattr(attention, "sliding_window", None)
        if window and queries == 1:
            keys = min(keys, window)
        return explicit_mask(mask, batch=batch, queries=queries, keys=keys, device=device)


def _key_mask(mask: Any) -> Tensor | None:
    """Which keys are real, (B, K): the mask itself, or what the last query sees where generate has prepared masks."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    return may_attend(mask)[:, 0, -1]
