"""KV caches under a plan: layers that store fewer positions than were seen, and what is known of the sequences.

transformers reads a sequence's length from a cache layer, to make positions and masks and to distinguish prefill from
decoding. These layers return the number of positions seen, which may exceed the number of positions stored.
Shapes: B batch, K positions so far, R remaining sequences.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from shortv.errors import ShortVError
from shortv.layers.rows import Selection
from shortv.plan import Mode

_HISTORY = "_shortv_history"


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


def count_positions(cache: Cache, index: int, *, batch: int, length: int, like: Tensor) -> None:
    """Make a layer count the positions of a forward, stored or not; it replaces an empty ordinary layer first."""
    while len(cache.layers) <= index:
        cache.layers.append(cast(Any, cache).layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, ShortenedLayer):
        layer = cache.layers[index] = ShortenedLayer(batch, like)
    layer.seen += length


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a plan knows of the sequences in a KV cache; an attribute of the cache holds it."""

    modes: tuple[Mode, ...]
    run: Hashable
    """The identity of the learned system's run, None where there is none."""
    visual_BK: Tensor
    has_visual: bool
    prompt: Selection
    """Text of the prompt."""
    prompt_length: int
    kept: tuple[Selection | None, ...] = ()
    """Positions of the prompt that each layer has K and V of, where exits have left it with fewer than all."""
    gathered: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)
    """What a learned system has gathered from each prompt (B first), by names of its own."""

    def of_rows(self, rows_R: Tensor) -> History:
        """Return the history of some of the sequences."""
        rows_R = rows_R.to(self.visual_BK.device)
        # Layers between two exits share a selection, so that they also share what is computed from it.
        narrowed = {id(kept): kept.of_rows(rows_R) for kept in self.kept if kept is not None}
        return replace(
            self,
            visual_BK=self.visual_BK[rows_R],
            prompt=self.prompt.of_rows(rows_R),
            kept=tuple(narrowed.get(id(kept)) for kept in self.kept),
            gathered={
                name: tuple(value[rows_R.to(value.device)] for value in values)
                for name, values in self.gathered.items()
            },
        )


def history_of(cache: Cache) -> History | None:
    """Return what a plan knows of the sequences in a KV cache; None for a cache filled without a plan."""
    history: History | None = getattr(cache, _HISTORY, None)
    return history


def remember(cache: Cache, history: History) -> None:
    """Store with a KV cache what a plan knows of its sequences."""
    setattr(cache, _HISTORY, history)


def keep_rows(cache: Cache, rows_R: Tensor) -> None:
    """Remove all other sequences of a batch from its KV cache and its history."""
    layers: list[Any] = cache.layers
    for layer in layers:
        # A model may be spread over several devices.
        if layer.is_initialized:
            layer.batch_select_indices(rows_R.to(layer.keys.device))
    history = history_of(cache)
    if history is not None:
        remember(cache, history.of_rows(rows_R))
