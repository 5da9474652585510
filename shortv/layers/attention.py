"""Attention of some rows over all rows, with a decoder layer's own weights and the model's own kernel.

Shapes: B batch, S query rows, T positions, K keys, H heads, D width, C width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def project(attention: Any, part: str, normed_BTD: Tensor) -> Tensor:
    """Queries, keys or values per head (B, H, T, C) by `q_proj`, `k_proj` or `v_proj`, with the family's head norm."""
    heads_BTHC = getattr(attention, f"{part}_proj")(normed_BTD).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)
    if norm is not None:
        heads_BTHC = norm(heads_BTHC)
    return cast(Tensor, heads_BTHC.transpose(1, 2))


def rotate(heads_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout that all supported backbones use, written over its input.

    Keys of all positions are the largest tensor that a frozen layer makes: every further one of its size costs more
    than the arithmetic.
    """
    half = heads_BHTC.shape[-1] // 2
    first, second = heads_BHTC[..., :half], heads_BHTC[..., half:]
    (cos_first, cos_second), (sin_first, sin_second) = (
        values.unsqueeze(1).chunk(2, dim=-1) for values in (cos_BTC, sin_BTC)
    )
    turned = first * sin_second
    first.mul_(cos_first).addcmul_(second, sin_first, value=-1)
    second.mul_(cos_second).add_(turned)
    return heads_BHTC


def attend(attention: Any, query_BHSC: Tensor, key_BHKC: Tensor, value_BHKC: Tensor, mask_BHSK: Tensor) -> Tensor:
    """Values mixed by the attention of each query (B, S, H C), before the output projection."""
    module = sys.modules[type(attention).__module__]
    function = cast(
        Callable[..., tuple[Tensor, Any]],
        ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, module.eager_attention_forward),
    )
    mixed_BSHC, _ = function(
        attention, query_BHSC, key_BHKC, value_BHKC, mask_BHSK, dropout=0.0, scaling=attention.scaling
    )
    return mixed_BSHC.flatten(2)
