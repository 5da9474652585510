"""The fast executor: what a mode leaves out is not computed.

Shapes: B batch, T positions of this forward, S updated rows of a sample and N of all samples, K keys, H heads,
C width of a head, E width of all heads, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shortv.families import Decoder
from shortv.layers.cache import count_positions
from shortv.layers.progress import Progress
from shortv.layers.rows import Split
from shortv.plan import Tokens, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """A decoder layer under a mode, and its place in a run of layers that work on the same tokens."""

    decoder: Decoder
    layer: nn.Module
    index: int
    work: Work
    own: Callable[..., Tensor]
    """The model's own forward of this layer."""
    progress: Progress
    first: bool
    """Whether a run begins here: the rows that it updates are taken out of all rows."""
    last: bool
    """Whether a run ends here: the updated rows are put back among all rows."""

    @property
    def starts(self) -> bool:
        """Whether this layer receives all rows."""
        return self.first or self.progress.joined

    @property
    def ends(self) -> bool:
        """Whether this layer returns all rows."""
        return self.last or self.progress.joined

    def shorten_cache(self, like: Tensor, cache: Cache | None) -> None:
        """Let this layer's KV cache count the positions of this forward, also those that it will not store."""
        if cache is not None:
            batch, length = self.progress.types.text_BT.shape
            count_positions(cache, self.index, batch=batch, length=length, like=like)

    def updated_rows(self, split: Split, hidden: Tensor) -> Tensor:
        """Return the rows (1, N, D) that this layer updates, from all rows or inside a run as they come in."""
        if self.starts:
            self.progress.rows_BTD = hidden
            return split.flat(hidden)
        self.progress.rows_BTD = self.progress.rows_BTD.to(hidden.device)
        return hidden


def execute(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Run a decoder layer's forward under its mode.

    In a forward without visual tokens (decoding, prompts without an image) a layer whose mode leaves out visual tokens
    alone is the model's own.
    """
    progress = planned.progress
    present = Tokens.ALL if progress.has_visual else Tokens.TEXT
    work = planned.work.among(present)
    _shorten(planned, work, hidden, arguments)
    if work == (present, present, present):
        return planned.own(hidden, **arguments)
    if work.queries and work.queries is work.ffn:
        run = frozen if work.keys is present else _bypassed
        return run(planned, progress.split(work.queries), hidden, **arguments)
    decoder, layer = planned.decoder, planned.layer
    middle_BTD = _attention_half(planned, work, present, hidden, **arguments)
    if work.ffn is present:
        return decoder.ffn_half(layer, middle_BTD)
    if not work.ffn:
        return middle_BTD
    split = progress.split(work.ffn)
    updated_1ND = decoder.ffn_half(layer, split.flat(middle_BTD))
    return split.put(middle_BTD, updated_1ND, in_place=middle_BTD is not hidden)


def _shorten(planned: PlannedLayer, work: Work, hidden: Tensor, arguments: dict[str, Any]) -> None:
    """Let a layer's cache count positions whose K and V it does not keep, and narrow the mask to those it keeps."""
    progress, keys = planned.progress, planned.work.keys
    if Tokens.TEXT in keys and (Tokens.VISUAL in keys or not progress.history.has_visual):
        return
    planned.shorten_cache(hidden, arguments.get("past_key_values"))
    if work.queries and not progress.has_visual:
        attention = planned.decoder.attention(planned.layer)
        arguments["attention_mask"] = progress.kept_columns(attention, arguments.get("attention_mask"), hidden.device)


def frozen(
    planned: PlannedLayer, split: Split, hidden: Tensor, visual_1ND: Tensor | None = None, **arguments: Any
) -> Tensor:
    """Let the rows of `split` attend to all rows and pass the FFN; the others give K and V alone.

    Args:
        visual_1ND: rows that replace the visual rows in this layer and all later ones.
    """
    decoder, layer, progress = planned.decoder, planned.layer, planned.progress
    updated_1ND = planned.updated_rows(split, hidden)
    ours = not planned.starts
    if visual_1ND is not None:
        progress.rows_BTD = progress.split(Tokens.VISUAL).put(progress.rows_BTD, visual_1ND, in_place=ours)
        ours = True
    normed_BTD = decoder.attention_norm(layer)(progress.rows_BTD)
    output_1ND = _attended(planned, split, normed_BTD, **arguments)
    updated_1ND = decoder.ffn_half(layer, decoder.add_attention(layer, updated_1ND, output_1ND))
    # All rows are up to date in every layer, so that keys and values of all rows are one product each, in order. The
    # first layer of a run makes the copy that the others write into: its input belongs to the model.
    progress.rows_BTD = split.put(progress.rows_BTD, updated_1ND, in_place=ours)
    return progress.rows_BTD if planned.ends else updated_1ND


def _attended(planned: PlannedLayer, split: Split, normed_BTD: Tensor, **arguments: Any) -> Tensor:
    """Return the attention output (1, N, D) of the updated rows over all rows."""
    attention: Any = planned.decoder.attention(planned.layer)
    mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
    if not split.is_less_work(mask, normed_BTD.shape[-1]):
        output_BTD, _ = attention(hidden_states=normed_BTD, **arguments)
        return split.flat(output_BTD)
    cos, sin = arguments["position_embeddings"]
    key, value = rotate(project(attention, "k", normed_BTD), cos, sin), project(attention, "v", normed_BTD)
    if cache is not None:
        key, value = cache.update(key, value, planned.index)
    query = split.by_sample(project(attention, "q", split.flat(normed_BTD)))
    query = rotate(query, split.updated_rows(cos), split.updated_rows(sin))
    mixed_BSE = attend(attention, query, key, value, split.mask_rows(mask, normed_BTD.device))
    output_1ND: Tensor = attention.o_proj(split.flattened(mixed_BSE))
    return output_1ND


def _bypassed(planned: PlannedLayer, split: Split, hidden: Tensor, **arguments: Any) -> Tensor:
    """Let the rows of `split` attend to each other and pass the FFN; the others pass unchanged, without K and V."""
    updated_1ND = layer_among(planned, split, planned.updated_rows(split, hidden), **arguments)
    return split.put(planned.progress.rows_BTD, updated_1ND) if planned.ends else updated_1ND


def layer_among(planned: PlannedLayer, split: Split, rows_1ND: Tensor, **arguments: Any) -> Tensor:
    """Run a dense layer over some rows of each sample, which attend to each other alone."""
    decoder, layer = planned.decoder, planned.layer
    attention: Any = decoder.attention(layer)
    normed_1ND = decoder.attention_norm(layer)(rows_1ND)
    cos_BSC, sin_BSC = (split.updated_rows(values) for values in arguments["position_embeddings"])
    query, key, value = (split.by_sample(project(attention, part, normed_1ND)) for part in "qkv")
    query, key = rotate(query, cos_BSC, sin_BSC), rotate(key, cos_BSC, sin_BSC)
    cache = arguments.get("past_key_values")
    if cache is not None:
        key, value = cache.update(key, value, planned.index)
    mask = split.mask_square(arguments.get("attention_mask"), rows_1ND.device)
    mixed_BSE = attend(attention, query, key, value, cast(Tensor, mask))
    output_1ND = attention.o_proj(split.flattened(mixed_BSE))
    return decoder.ffn_half(layer, decoder.add_attention(layer, rows_1ND, output_1ND))


def _attention_half(planned: PlannedLayer, work: Work, present: Tokens, hidden: Tensor, **arguments: Any) -> Tensor:
    """Return the residual stream after the attention half of a layer whose FFN works on other tokens."""
    decoder, layer, progress = planned.decoder, planned.layer, planned.progress
    if not work.keys:
        return hidden
    normed_BTD = decoder.attention_norm(layer)(hidden)
    if not work.queries:
        _store(planned, work, present, normed_BTD, **arguments)
        return hidden
    if work.queries is present:
        output_BTD, _ = decoder.attention(layer)(hidden_states=normed_BTD, **arguments)
        return decoder.add_attention(layer, hidden, output_BTD)
    split = progress.split(work.queries)
    output_1ND = _attended(planned, split, normed_BTD, **arguments)
    return split.put(hidden, decoder.add_attention(layer, split.flat(hidden), output_1ND))


def _store(planned: PlannedLayer, work: Work, present: Tokens, normed_BTD: Tensor, **arguments: Any) -> None:
    """Store keys and values for later forwards where no token of this forward attends."""
    cache = arguments.get("past_key_values")
    if cache is None:
        return
    attention, (cos, sin) = planned.decoder.attention(planned.layer), arguments["position_embeddings"]
    if work.keys is not present:
        rows = planned.progress.split(work.keys).updated
        normed_BTD, cos, sin = rows.rows(normed_BTD), rows.rows(cos), rows.rows(sin)
    key, value = rotate(project(attention, "k", normed_BTD), cos, sin), project(attention, "v", normed_BTD)
    cache.update(key, value, planned.index)


def project(attention: Any, part: str, normed_BTD: Tensor) -> Tensor:
    """Return queries, keys or values per head, (B, H, T, C), normalised where the family does so.

    Args:
        part: "q", "k" or "v".
    """
    heads_BTHC = getattr(attention, f"{part}_proj")(normed_BTD).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)
    if norm is not None:
        heads_BTHC = norm(heads_BTHC)
    return cast(Tensor, heads_BTHC.transpose(1, 2))


def rotate(heads_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Apply rotary position embeddings in place, in the half-split layout that all supported backbones use.

    Keys of all positions are the largest tensor of a frozen layer: a second one of that size costs more than the
    arithmetic.
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
    """Return each query's weighted values, (B, S, E), before the output projection, by the model's own kernel."""
    module = sys.modules[type(attention).__module__]
    function = cast(
        Callable[..., tuple[Tensor, Any]],
        ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, module.eager_attention_forward),
    )
    mixed_BSHC, _ = function(
        attention, query_BHSC, key_BHKC, value_BHKC, mask_BHSK, dropout=0.0, scaling=attention.scaling
    )
    return mixed_BSHC.flatten(2)
