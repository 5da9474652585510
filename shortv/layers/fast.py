"""The fast executors: what a mode leaves out is not computed.

Each function is a decoder layer's forward under one mode. Where a forward brings no visual tokens (decoding, prompts
without an image) the visual modes are the model's own layer. Shapes: B batch, T positions of this forward, S updated
rows of a sample and N of all, K keys, D width, E width of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shortv.families import Decoder
from shortv.layers.attention import attend, project, rotate
from shortv.layers.cache import shortened_layer
from shortv.layers.progress import Progress
from shortv.layers.streams import Split
from shortv.plan import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """A decoder layer under a mode, and its place in a run of layers with that mode."""

    decoder: Decoder
    layer: nn.Module
    index: int
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


def freeze_visual(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Visual tokens give K and V alone (ShortV, section 3.2)."""
    if not planned.progress.has_visual:
        return planned.own(hidden, **arguments)
    return frozen(planned, planned.progress.text, hidden, **arguments)


def freeze_text(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Text tokens, generated ones too, give K and V alone (for analysis)."""
    if planned.progress.has_visual:
        return frozen(planned, planned.progress.visual, hidden, **arguments)
    cache = arguments.get("past_key_values")
    if cache is not None:
        attention = planned.decoder.attention(planned.layer)
        normed_BTD = planned.decoder.attention_norm(planned.layer)(hidden)
        key = rotate(project(attention, "k", normed_BTD), *arguments["position_embeddings"])
        cache.update(key, project(attention, "v", normed_BTD), planned.index)
    return hidden


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
        progress.rows_BTD = progress.visual.put(progress.rows_BTD, visual_1ND, in_place=ours)
        ours = True
    normed_BTD = decoder.attention_norm(layer)(progress.rows_BTD)
    output_1ND = _attended(planned, split, normed_BTD, **arguments)
    updated_1ND = decoder.ffn_half(layer, decoder.add_attention(layer, updated_1ND, output_1ND))
    # Kept up to date in every layer, so that keys and values of all rows are one product each, in order. A run's
    # first layer makes the copy that the others write into: what it was given is the model's own.
    progress.rows_BTD = split.put(progress.rows_BTD, updated_1ND, in_place=ours)
    return progress.rows_BTD if planned.ends else updated_1ND


def no_visual_queries(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Visual tokens do not attend, their FFN runs (NAAViT, SAISA section 3)."""
    if not planned.progress.has_visual:
        return planned.own(hidden, **arguments)
    decoder, layer, split = planned.decoder, planned.layer, planned.progress.text
    output_1ND = _attended(planned, split, decoder.attention_norm(layer)(hidden), **arguments)
    updated_1ND = decoder.add_attention(layer, split.flat(hidden), output_1ND)
    return decoder.ffn_half(layer, split.put(hidden, updated_1ND))


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


def no_visual_ffn(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Visual tokens attend, their FFN is skipped."""
    if not planned.progress.has_visual:
        return planned.own(hidden, **arguments)
    decoder, layer, split = planned.decoder, planned.layer, planned.progress.text
    output_BTD, _ = decoder.attention(layer)(hidden_states=decoder.attention_norm(layer)(hidden), **arguments)
    middle_BTD = decoder.add_attention(layer, hidden, output_BTD)
    return split.put(middle_BTD, decoder.ffn_half(layer, split.flat(middle_BTD)), in_place=True)


def skip_attention(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """x + FFN(norm(x)) for every token (EAS); no K and V are made or kept."""
    cache = arguments.get("past_key_values")
    if cache is not None:
        shortened_layer(cache, planned.index, len(hidden), hidden).seen += hidden.shape[1]
    return planned.decoder.ffn_half(planned.layer, hidden)


def drop_visual(planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
    """Visual tokens are gone; text keeps its original positions (VTW, DyVTE)."""
    progress = planned.progress
    if not progress.history.has_visual:
        return planned.own(hidden, **arguments)
    cache = arguments.get("past_key_values")
    if cache is not None:
        shortened_layer(cache, planned.index, len(hidden), hidden).seen += progress.length
    mask = arguments.get("attention_mask")
    if not progress.has_visual:
        arguments["attention_mask"] = progress.kept_columns(
            planned.decoder.attention(planned.layer), mask, hidden.device
        )
        return planned.own(hidden, **arguments)
    split = progress.text
    updated_BSD = planned.given(split.updated.rows, hidden)
    arguments["attention_mask"] = split.mask_square(mask, hidden.device)
    arguments["position_embeddings"] = tuple(split.updated_rows(value) for value in arguments["position_embeddings"])
    updated_BSD = planned.own(updated_BSD, **arguments)
    return split.put(progress.rows_BTD, split.flattened(updated_BSD)) if planned.ends else updated_BSD


EXECUTORS: dict[Mode, Callable[..., Tensor]] = {
    Mode.FREEZE_VISUAL: freeze_visual,
    Mode.FREEZE_TEXT: freeze_text,
    Mode.NO_VISUAL_QUERIES: no_visual_queries,
    Mode.NO_VISUAL_FFN: no_visual_ffn,
    Mode.SKIP_ATTENTION: skip_attention,
    Mode.DROP_VISUAL: drop_visual,
}
"""How a layer runs under each mode; a `full` layer is not touched."""

RUNS = frozenset({Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT, Mode.DROP_VISUAL})
"""Modes whose streams stay apart over consecutive layers."""
