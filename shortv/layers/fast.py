"""The fast executor: what a mode leaves out is not computed.

Shapes: B batch, T positions of this forward, S updated rows of a sample and N of all, K keys, D width, E width of all
heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from shortv.families import Decoder
from shortv.layers.attention import attend, project, rotate
from shortv.layers.cache import shortened_layer
from shortv.layers.progress import Progress
from shortv.layers.streams import Split
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
    """Whether the run begins here: the two streams part."""
    last: bool
    """Whether the run ends here: they join."""

    @property
    def starts(self) -> bool:
        """Whether this layer is given all rows."""
        return self.first or self.progress.joined

    @property
    def ends(self) -> bool:
        """Whether this layer gives all rows."""
        return self.last or self.progress.joined

    def given(self, take: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The updated rows of what this layer is given: taken out of all rows, or inside a run what comes in."""
        if self.starts:
            self.progress.rows_BTD = hidden
            return take(hidden)
        self.progress.rows_BTD = self.progress.rows_BTD.to(hidden.device)
        return hidden


def execute(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """A decoder layer's forward under its mode.

    Where a forward brings no visual tokens (decoding, prompts without an image) the layer works on all that it brings
    unless its mode leaves out text.
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
    """Let the cache of a layer count positions that it keeps no K and V of, and fit the mask of later ones to it."""
    progress, keys = planned.progress, planned.work.keys
    if Tokens.TEXT in keys and (Tokens.VISUAL in keys or not progress.history.has_visual):
        return
    cache = arguments.get("past_key_values")
    if cache is not None:
        shortened_layer(cache, planned.index, len(hidden), hidden).seen += progress.length
    if work.queries and not progress.has_visual:
        attention = planned.decoder.attention(planned.layer)
        arguments["attention_mask"] = progress.kept_columns(attention, arguments.get("attention_mask"), hidden.device)


def frozen(
    planned: PlannedLayer, split: Split, hidden: Tensor, visual_1ND: Tensor | None = None, **arguments: Any
) -> Tensor:
    """The rows of `split` attend to all rows and pass the FFN; the others give K and V alone.

    Args:
        visual_1ND: what stands in the visual rows from this layer on, in place of what they held.
    """
    decoder, layer, progress = planned.decoder, planned.layer, planned.progress
    updated_1ND = planned.given(split.flat, hidden)
    ours = not planned.starts
    if visual_1ND is not None:
        progress.rows_BTD = progress.split(Tokens.VISUAL).put(progress.rows_BTD, visual_1ND, in_place=ours)
        ours = True
    normed_BTD = decoder.attention_norm(layer)(progress.rows_BTD)
    output_1ND = _attended(planned, split, normed_BTD, **arguments)
    updated_1ND = decoder.ffn_half(layer, decoder.add_attention(layer, updated_1ND, output_1ND))
    # Kept up to date in every layer, so that keys and values of all rows are one product each, in order. A run's
    # first layer makes the copy that the others write into: what it was given is the model's own.
    progress.rows_BTD = split.put(progress.rows_BTD, updated_1ND, in_place=ours)
    return progress.rows_BTD if planned.ends else updated_1ND


def _attended(planned: PlannedLayer, split: Split, normed_BTD: Tensor, **arguments: Any) -> Tensor:
    """Attention output (1, N, D) of the updated rows over all rows."""
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
    """The rows of `split` attend to each other and pass the FFN; the others pass unchanged, without K and V."""
    updated_1ND = layer_among(planned, split, planned.given(split.flat, hidden), **arguments)
    return split.put(planned.progress.rows_BTD, updated_1ND) if planned.ends else updated_1ND


def layer_among(planned: PlannedLayer, split: Split, rows_1ND: Tensor, **arguments: Any) -> Tensor:
    """A dense layer over some rows of each sample, which attend to each other alone."""
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
    """The residual stream behind the attention half, where FFN and attention work on different tokens."""
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
    """Keep keys and values of tokens for later ones, where no token of this forward attends to them."""
    cache = arguments.get("past_key_values")
    if cache is None:
        return
    attention, (cos, sin) = planned.decoder.attention(planned.layer), arguments["position_embeddings"]
    if work.keys is not present:
        rows = planned.progress.split(work.keys).updated
        normed_BTD, cos, sin = rows.rows(normed_BTD), rows.rows(cos), rows.rows(sin)
    key, value = rotate(project(attention, "k", normed_BTD), cos, sin), project(attention, "v", normed_BTD)
    cache.update(key, value, planned.index)
