"""Learned parts stay with a model from one use to the next: a 7B model's may be gigabytes to read and to check."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from shortv.architecture import Architecture
from shortv.families.decoder import Decoder
from shortv.families.parts.base import Parts
from shortv.families.parts.files import check_parts, load_parts
from shortv.plan import LearnedParts

HELD = 2
"""How many parts one model holds; those used last stay."""
_held: WeakKeyDictionary[nn.Module, dict[Any, Parts]] = WeakKeyDictionary()


def held_parts(named: LearnedParts, decoder: Decoder, architecture: Architecture) -> Parts:
    """What a plan names for a model, loaded where the model does not hold it yet. Raises Refused as `load_parts` does.

    What is held was as the plan's digest says when it was loaded; what the folder says of itself is checked each time.
    """
    check_parts(named, architecture.config_digest)
    weights = [next(layer.parameters()) for layer in decoder.layers]
    key = (named.kind, named.digest, *((weight.device, weight.dtype) for weight in weights))
    held = _held.setdefault(decoder.text, {})
    parts = held.pop(key, None)
    if parts is None:
        # Room is made first: old and new parts together may be more than a device has.
        for oldest in list(held)[: len(held) - HELD + 1]:
            held.pop(oldest, None)
        parts = load_parts(named, decoder, architecture)
    held[key] = parts
    return parts
