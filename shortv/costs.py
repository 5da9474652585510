"""What a plan costs: FLOPs of a prefill, and layer passes of a sweep.

2 FLOPs per multiply-accumulate; attention matmuls count in full, without a causal half. Embeddings,
norms, LM head, vision tower, projector and decoding are left out. ShortV equations 3-5, extended to
grouped-query attention and to the other modes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.plan import WORK, Mode, Tokens, Work, works_of

# Token counts may be whole, or means over samples; FLOPs come in the same kind of number.
Count = TypeVar("Count", int, float)


class Passes(NamedTuple):
    """Work on top of one shared clean pass: whole layers, FFNs alone, layers over text tokens alone."""

    layers: int = 0
    ffn: int = 0
    text_layers: int = 0


def layer_flops(arch: Architecture, mode: Mode, t: Count, v: Count) -> Count:
    """Return the prefill FLOPs of one layer in `mode`, for `t` text and `v` visual tokens of one prompt."""
    return _work_flops(arch, WORK[mode], t, v)


def plan_flops(arch: Architecture, modes: Sequence[Mode], t: Count, v: Count) -> Count:
    """Return the prefill FLOPs of all layers; raises Refused when there is not one mode per layer."""
    if len(modes) != arch.num_layers:
        raise Refused(f"found {len(modes)} modes for a model of {arch.num_layers} layers; give one mode per layer")
    total = 0 * t
    for work in works_of(modes):
        total += _work_flops(arch, work, t, v)
    return total


def count_of(tokens: Tokens, t: Count, v: Count) -> Count:
    """Return the number of these tokens among `t` text and `v` visual tokens."""
    return (Tokens.TEXT in tokens) * t + (Tokens.VISUAL in tokens) * v


def _work_flops(arch: Architecture, work: Work, t: Count, v: Count) -> Count:
    if not (0 <= t < math.inf and 0 <= v < math.inf):
        raise Refused(f"token counts must not be negative, found t={t} and v={v}; check the samples")
    queries, keys, ffn = (count_of(tokens, t, v) for tokens in work)
    query_width = arch.num_heads * arch.head_dim
    key_width = arch.num_kv_heads * arch.head_dim
    projections = 4 * arch.hidden_size * (queries * query_width + keys * key_width)
    attention = 4 * queries * keys * query_width
    return projections + attention + 6 * ffn * arch.hidden_size * arch.intermediate_size


def flops_ratio(arch: Architecture, modes: Sequence[Mode], t: float, v: float) -> float:
    """Return the prefill FLOPs of the modes divided by those of the full model, between 0 and 1."""
    if t + v <= 0:
        raise Refused("a FLOPs ratio needs at least one token, found none; check the samples")
    return plan_flops(arch, modes, t, v) / (arch.num_layers * layer_flops(arch, Mode.FULL, t, v))


def visual_tokens_at(arch: Architecture, share: float, t: float, v: float) -> float:
    """Return how many visual tokens leave the full model this share of its prefill FLOPs at (t, v); 0 if none do."""
    # The FLOPs of n tokens are a n + b n^2.
    one, two = (layer_flops(arch, Mode.FULL, n, 0.0) for n in (1.0, 2.0))
    b = (two - 2 * one) / 2
    a = one - b
    wanted = share * layer_flops(arch, Mode.FULL, float(t), float(v))
    return max(0.0, (math.sqrt(a * a + 4 * b * wanted) - a) / (2 * b) - t)


def ablation_passes(num_layers: int, mode: Mode, layer: int) -> Passes:
    """Return what one ablation costs when it restarts from the clean pass's states at `layer`.

    The clean pass holds every token's output of this layer's attention and FFN, so leaving tokens out costs nothing
    there. Tokens that pass the FFN without attending need another FFN pass; where queries lose keys, the layer runs
    again over the text alone. An ablation that drops visual tokens shares no pass from `layer` on.
    """
    if mode is Mode.FULL:
        return Passes()
    if mode is Mode.DROP_VISUAL:
        return Passes(text_layers=num_layers - layer)
    work = WORK[mode]
    ffn = not work.hides_keys and bool(work.ffn & ~work.queries)
    return Passes(layers=num_layers - 1 - layer, ffn=int(ffn), text_layers=int(work.hides_keys))


def sweep_passes(num_layers: int, mode: Mode) -> Passes:
    """Return what a sweep of `mode` over all layers costs per sample, on top of its one clean pass."""
    ablations = [ablation_passes(num_layers, mode, layer) for layer in range(num_layers)]
    return Passes(*(sum(column) for column in zip(*ablations, strict=True)))


def sweep_flops(arch: Architecture, modes: Sequence[Mode], t: Count, v: Count) -> Count:
    """Return the FLOPs per sample of a sweep of all layers: one clean pass and the passes of every mode.

    Each unit beyond the first of a batch repeats the clean pass; that, and the noise floor, are left out.
    """
    full = layer_flops(arch, Mode.FULL, t, v)
    ffn = layer_flops(arch, Mode.SKIP_ATTENTION, t, v)
    text = layer_flops(arch, Mode.DROP_VISUAL, t, v)
    total = arch.num_layers * full
    for mode in modes:
        passes = sweep_passes(arch.num_layers, mode)
        total += passes.layers * full + passes.ffn * ffn + passes.text_layers * text
    return total


def activation_bytes(arch: Architecture, tokens: int, itemsize: int) -> int:
    """Return the bytes that one layer works in: six tensors of the model's width and three of the FFN's.

    From this the sweep engine decides how many ablations it stacks.
    """
    return tokens * (6 * arch.hidden_size + 3 * arch.intermediate_size) * itemsize


STACK_SHARE = 0.25
"""Share of a GPU's memory that stacked ablations may fill."""
