"""DyVTE: after each layer of the prefill a router may let a sample's visual tokens go (arXiv 2411.19628, section 3).

Visual rows of a sample that exits after layer e are in no later layer: not among the rows of its products and not in
its KV cache. Text keeps its positions. Nothing is decided while decoding; each layer's mask is that of what it kept.
Routers read the prompt alone, also where its answer passes the model with it (`families.prompted`).
Shapes: B batch, T positions, S rows of a sample (packed), N rows of all samples, K keys, D width, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from shortv.errors import Refused
from shortv.families import Decoder
from shortv.families.parts.base import Learned
from shortv.families.parts.dyvte import ExitRouters, TextRows, averaged, check_can_exit
from shortv.families.tokens import Selection, TokenTypes, hide_keys
from shortv.layers.cache import shortened_layer
from shortv.layers.fast import PlannedLayer, layer_among
from shortv.layers.progress import Progress
from shortv.layers.sequence import SequenceState, history_of
from shortv.layers.streams import Split
from shortv.plan import Mode


def exit_layers(cache: Cache) -> list[int] | None:
    """The layer after which each sample's visual tokens left, from a KV cache that a forward has filled.

    The number of layers stands for never, as for a sample without an image. None: the plan has no routers.
    """
    history = history_of(cache)
    return None if history is None or history.exits_B is None else history.exits_B.tolist()


class Exits:
    """A plan with routers on one model: a LearnedRun."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], learned: Learned) -> None:
        """Check that the routers can run.

        Raises:
            Refused: modes besides full, a model or routers that don't go together, or a threshold that is missing.
        """
        check_can_exit(decoder)
        others = sorted(set(modes) - {Mode.FULL})
        if others:
            raise Refused(f"DyVTE decides itself what leaves, but layers of this plan are {others[0]}; make all full")
        if learned.threshold is None or not 0 <= learned.threshold <= 1:
            raise Refused(f"the exit threshold is {learned.threshold}; give a probability, 0 to 1")
        parts = cast(ExitRouters, learned.parts)
        if len(parts.routers) != len(modes):
            raise Refused(f"{len(parts.routers)} routers for a model of {len(modes)} layers; give one router per layer")
        self._decoder, self._parts, self._threshold = decoder, parts, learned.threshold
        self._prefill: _Prefill | None = None

    def executor(self, index: int) -> Callable[..., Tensor]:
        """One for every layer: each has a router."""
        return self._run

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Begin a prefill before its first layer, when little is under way that counting tokens would wait for."""

        def begin(*_: Any) -> None:
            self._prefill = None
            if progress.has_visual:
                self._prefill = _Prefill(progress, self._parts, self._threshold)
            elif not progress.past:
                progress.history = replace(progress.history, exits_B=_nobody(progress.types, len(self._parts.routers)))

        def finish(*_: Any) -> None:
            self._prefill = None

        undo.callback(model.register_forward_pre_hook(begin).remove)
        undo.callback(model.register_forward_hook(finish, always_call=True).remove)

    def _run(self, planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
        if self._prefill is not None:
            return _prefilled(planned, self._prefill, hidden, **arguments)
        progress = planned.progress
        kept = progress.history.kept[planned.index] if progress.history.kept else None
        if kept is not None:
            cache = arguments.get("past_key_values")
            if cache is not None:
                shortened_layer(cache, planned.index, len(hidden), hidden).seen += progress.length
            attention = planned.decoder.attention(planned.layer)
            mask = arguments.get("attention_mask")
            arguments["attention_mask"] = progress.kept_columns(attention, mask, hidden.device, kept)
        return planned.own(hidden, **arguments)

    def attach_reference(self, model: nn.Module, sequence: SequenceState, hooks: ExitStack) -> None:
        """Dense layers whose visual keys are hidden, sample by sample, behind the layer where they leave."""
        _attach_reference(self._decoder, self._parts, self._threshold, sequence, hooks)


class _Prefill:
    """One prefill with images: who has left so far, and which rows are there."""

    def __init__(self, sequence: SequenceState, parts: ExitRouters, threshold: float) -> None:
        types, read = sequence.types, prompt_types(sequence)
        self._types, self._parts, self._threshold = types, parts, threshold
        self._num_layers = len(parts.routers)
        mean_BT = averaged(read, parts.settings.mean_over)
        # All that the host has to know is asked for at once; from here on, only who leaves.
        counts = torch.stack([types.text_BT.sum(1), types.visual_BT.sum(1), mean_BT.sum(1)])
        self._n_text, self._n_visual, n_mean = counts.tolist()
        self._all_text = TextRows.of(read, parts.settings.mean_over, width=max(n_mean))
        self._text = self._all_text
        self._exits = [self._num_layers] * len(self._n_visual)
        self._has_image_B = types.visual_BT.any(1)
        self.exits_B = _nobody(types, self._num_layers)
        self.split: Split | None = None
        """The rows that are left; None while all are."""
        self.kept: list[Selection | None] = [None] * self._num_layers

    @property
    def _waiting(self) -> bool:
        """Whether any sample has visual tokens left."""
        return any(own and left == self._num_layers for own, left in zip(self._n_visual, self._exits, strict=True))

    def decide(self, layer: int, rows_ND: Tensor) -> None:
        """Ask the router behind a layer, and let visual tokens go."""
        if not self._waiting:
            return
        state_BE = self._text.state(rows_ND)
        leaves_B = (self._parts.exit_probability(layer, state_BE) >= self._threshold).to(self.exits_B.device)
        waits_B = (self.exits_B == self._num_layers) & self._has_image_B
        self.exits_B = self.exits_B.masked_fill(leaves_B & waits_B, layer)
        if layer == self._num_layers - 1:
            return
        exits = self.exits_B.tolist()
        if exits != self._exits:
            self._exits = exits
            self._leave(layer)

    def _leave(self, layer: int) -> None:
        gone_B1 = (self.exits_B <= layer)[:, None]
        left_BT = self._types.text_BT | (self._types.visual_BT & ~gone_B1)
        counts = [
            text + (0 if left <= layer else visual)
            for text, visual, left in zip(self._n_text, self._n_visual, self._exits, strict=True)
        ]
        self.split = Split(left_BT, counts=counts)
        self._text = self._all_text.among(left_BT)
        self.kept[layer + 1 :] = [self.split.updated] * (self._num_layers - layer - 1)


def prompt_types(sequence: SequenceState) -> TokenTypes:
    """What routers read: text of the prompts, and where their images are."""
    types = sequence.types
    return TokenTypes(visual_BT=types.visual_BT, text_BT=types.text_BT & sequence.prompt_BT)


def _nobody(types: TokenTypes, num_layers: int) -> Tensor:
    """Exits (B,) where no sample leaves."""
    return torch.full_like(types.text_BT[:, 0], num_layers, dtype=torch.long)


def _prefilled(planned: PlannedLayer, prefill: _Prefill, hidden: Tensor, **arguments: Any) -> Tensor:
    """A layer and the decision behind it; from the first exit on, rows stand one after the other, (1, N, D)."""
    progress, split = planned.progress, prefill.split
    if split is None:
        output = planned.own(hidden, **arguments)
    else:
        if progress.joined:
            progress.rows_BTD, hidden = hidden, split.flat(hidden)
        cache = arguments.get("past_key_values")
        if cache is not None:
            shortened_layer(cache, planned.index, len(progress.types.text_BT), hidden).seen += progress.length
        output = layer_among(planned, split, hidden, **arguments)
    prefill.decide(planned.index, output.flatten(0, 1))
    last = planned.index == len(planned.decoder.layers) - 1
    if last:
        progress.history = replace(progress.history, exits_B=prefill.exits_B, kept=tuple(prefill.kept))
    after, whole = prefill.split, progress.joined or last
    if after is None or (after is split and not whole):
        return output
    # What a layer gave is not written over: hooks may hold it.
    progress.rows_BTD = output if split is None else split.put(progress.rows_BTD.to(output.device), output)
    return progress.rows_BTD if whole else after.flat(progress.rows_BTD)


def _attach_reference(
    decoder: Decoder, parts: ExitRouters, threshold: float, sequence: SequenceState, hooks: ExitStack
) -> None:
    num_layers = len(decoder.layers)

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if index == 0 and (sequence.has_visual or not sequence.past):
            sequence.history = replace(sequence.history, exits_B=_nobody(sequence.types, num_layers))
        exits_B = cast(Tensor, sequence.history.exits_B).to(hidden_BTD.device)
        gone_BK = sequence.visual_BK.to(hidden_BTD.device) & (exits_B < index)[:, None]
        if not gone_BK.any():
            return args, kwargs
        mask = sequence.mask_of(
            decoder.attention(decoder.layers[index]), kwargs.get("attention_mask"), hidden_BTD.device
        )
        return args, {**kwargs, "attention_mask": hide_keys(mask, gone_BK[:, -mask.shape[3] :])}

    def leave(index: int, output_BTD: Tensor) -> None:
        if not sequence.has_visual:
            return
        exits_B = cast(Tensor, sequence.history.exits_B).clone()
        types = prompt_types(sequence)
        for row in (exits_B == num_layers).nonzero()[:, 0].tolist():
            state_1E = text_state(output_BTD[row], types.visual_BT[row], types.text_BT[row], parts.settings.mean_over)
            if state_1E is not None and parts.exit_probability(index, state_1E) >= threshold:
                exits_B[row] = index
        sequence.history = replace(sequence.history, exits_B=exits_B)

    for index, layer in enumerate(decoder.layers):
        before = layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True
        )
        after = layer.register_forward_hook(lambda _, __, output, index=index: leave(index, output))
        for handle in (before, after):
            hooks.callback(handle.remove)


def text_state(hidden_TD: Tensor, visual_T: Tensor, text_T: Tensor, mean_over: str) -> Tensor | None:
    """What a router reads of one sample, word by word; None without an image, where nothing can leave."""
    if not visual_T.any():
        return None
    *earlier, last = text_T.nonzero()[:, 0].tolist()
    if mean_over == "after-image":
        after = int(visual_T.nonzero().max())
        earlier = [position for position in earlier if position > after]
    mean_D = hidden_TD[earlier or [last]].float().mean(0)
    return torch.cat([mean_D, hidden_TD[last].float()])[None]
