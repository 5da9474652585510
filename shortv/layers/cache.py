"""KV cache layers for plans that store fewer positions than were seen.

transformers reads a sequence's length from a cache layer, to make positions and masks and to distinguish prefill from
decoding. These layers return the number of positions seen, which may exceed the number of positions stored.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from shortv.errors import ShortVError


class ShortenedLayer(DynamicLayer):
    """A cache layer that stores K and V of some positions, or of none, and counts all positions."""

    keys: Tensor
    values: Tensor

    def __init__(self, batch: int, like: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(like, like)
        # No positions yet, but a batch axis: beams may be reordered before anything is stored.
        self.keys = like.new_empty(batch, 1, 0, 1)
        self.values = like.new_empty(batch, 1, 0, 1)
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append K and V of positions that this layer stores."""
        if self.keys.shape[2]:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of positions seen, stored or not."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences, as a beam search does."""
        self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
        self.values = self.values.index_select(0, beam_idx.to(self.values.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the last positions seen are not the last positions stored. Raises ShortVError."""
        raise ShortVError("a plan that drops or skips cannot take tokens back from its cache (assisted generation)")


def shortened_layer(cache: Cache, index: int, batch: int, like: Tensor) -> ShortenedLayer:
    """Return the shortened layer at `index` of a cache; it replaces an empty ordinary layer first."""
    while len(cache.layers) <= index:
        cache.layers.append(cast(Any, cache).layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, ShortenedLayer):
        layer = cache.layers[index] = ShortenedLayer(batch, like)
    return layer
