"""How DyVTE's routers run: after each layer of the prefill a router may let a sample's visual tokens leave.

Visual rows of a sample that exits after layer e are in no later layer: not among the rows of its products and not in
its KV cache. Text keeps its positions. Decoding decides nothing; each layer's mask covers the positions that it kept.
Routers read the prompt alone, also where its answer passes the model in the same forward (see `prompted`).
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
from shortv.families.tokens import TokenTypes
from shortv.layers.cache import History, history_of
from shortv.layers.fast import PlannedLayer, layer_among
from shortv.layers.progress import Progress
from shortv.layers.rows import Selection, Split, hide_keys
from shortv.learned.base import PartsRun
from shortv.learned.dyvte.parts import ExitRouters, TextRows, averaged, check_can_exit
from shortv.plan import Mode

_EXITS = "exits"
"""Name of the exits (B,) among what a run has gathered from the prompts."""


def exit_layers(cache: Cache) -> list[int] | None:
    """Return the layer after which each sample's visual tokens left, from a KV cache that a forward has filled.

    The number of layers means never, as for a sample without an image. None means that the plan has no routers.
    """
    history = history_of(cache)
    exits_B = _exits(history) if history is not None else None
    return None if exits_B is None else exits_B.tolist()


def _exits(history: History) -> Tensor | None:
    return history.gathered.get(_EXITS, (None,))[0]


class ExitRun(PartsRun[ExitRouters]):
    """A plan with routers on one model."""

    reads_prompt = True
    drops_visual = True

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], parts: ExitRouters, threshold: float | None) -> None:
        """Check that the routers can run.

        Raises:
            Refused: a mode besides full, a model or routers that do not fit together, or a missing threshold.
        """
        super().__init__(decoder, modes, parts, threshold)
        check_can_exit(decoder)
        others = sorted(set(modes) - {Mode.FULL})
        if others:
            raise Refused(f"DyVTE itself decides what leaves, but this plan has {others[0]} layers; make all full")
        if threshold is None or not 0 <= threshold <= 1:
            raise Refused(f"the exit threshold is {threshold}; give a probability, 0 to 1")
        if len(parts.routers) != len(modes):
            raise Refused(f"{len(parts.routers)} routers for a model of {len(modes)} layers; give one router per layer")
        self._threshold = threshold
        self._prefill: _Prefill | None = None

    def executor(self, index: int) -> Callable[..., Tensor]:
        """Return the same forward for every layer: each has a router."""
        return self._run

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Begin a prefill before its first layer, while counting tokens does not have to wait for the device."""

        def begin(*_: Any) -> None:
            self._prefill = None
            if progress.has_visual:
                self._prefill = _Prefill(progress, self.parts, self._threshold)
            elif not progress.past:
                progress.history.gathered[_EXITS] = (_never(progress.types, len(self.modes)),)

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
            planned.shorten_cache(hidden, arguments.get("past_key_values"))
            attention = planned.decoder.attention(planned.layer)
            mask = arguments.get("attention_mask")
            arguments["attention_mask"] = progress.kept_columns(attention, mask, hidden.device, kept)
        return planned.own(hidden, **arguments)

    def before(
        self, progress: Progress, index: int, hidden_BTD: Tensor, arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Hide visual keys from a dense layer, sample by sample, behind the layer after which they leave."""
        history = progress.history
        if index == 0 and (progress.has_visual or not progress.past):
            history.gathered[_EXITS] = (_never(progress.types, len(self.modes)),)
        exits_B = cast(Tensor, _exits(history)).to(hidden_BTD.device)
        gone_BK = progress.visual_BK.to(hidden_BTD.device) & (exits_B < index)[:, None]
        if gone_BK.any():
            attention = self.decoder.attention(self.decoder.layers[index])
            mask = progress.mask_of(attention, arguments.get("attention_mask"), hidden_BTD.device)
            arguments["attention_mask"] = hide_keys(mask, gone_BK[:, -mask.shape[3] :])
        return (hidden_BTD,), arguments

    def after(self, progress: Progress, index: int, entered_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Let the router behind a dense layer decide, sample by sample."""
        if progress.has_visual:
            types, mean_over = prompt_types(progress), self.parts.settings.mean_over
            exits_B = cast(Tensor, _exits(progress.history)).clone()
            for row in (exits_B == len(self.modes)).nonzero()[:, 0].tolist():
                state_1E = text_state(output_BTD[row], types.visual_BT[row], types.text_BT[row], mean_over)
                if state_1E is not None and self.parts.exit_probability(index, state_1E) >= self._threshold:
                    exits_B[row] = index
            progress.history.gathered[_EXITS] = (exits_B,)
        return output_BTD


class _Prefill:
    """One prefill with images: which samples' visual tokens have left, and which rows remain."""

    def __init__(self, sequence: Progress, parts: ExitRouters, threshold: float) -> None:
        types, read = sequence.types, prompt_types(sequence)
        self._types, self._parts, self._threshold = types, parts, threshold
        self._num_layers = len(parts.routers)
        mean_BT = averaged(read, parts.settings.mean_over)
        # The host waits for the device here once for all counts; from here on, only for decisions.
        counts = torch.stack([types.text_BT.sum(1), types.visual_BT.sum(1), mean_BT.sum(1)])
        self._n_text, self._n_visual, n_mean = counts.tolist()
        self._all_text = TextRows.of(read, parts.settings.mean_over, width=max(n_mean))
        self._text = self._all_text
        self._exits = [self._num_layers] * len(self._n_visual)
        self._has_image_B = types.visual_BT.any(1)
        self.exits_B = _never(types, self._num_layers)
        self.split: Split | None = None
        """The rows that remain; None while all do."""
        self.kept: list[Selection | None] = [None] * self._num_layers

    @property
    def _waiting(self) -> bool:
        """Whether any sample still has visual tokens."""
        return any(own and left == self._num_layers for own, left in zip(self._n_visual, self._exits, strict=True))

    def decide(self, layer: int, rows_ND: Tensor) -> None:
        """Let the router behind a layer decide, and remove visual rows."""
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


def prompt_types(sequence: Progress) -> TokenTypes:
    """Return what routers read: the text of the prompts, and where their images are."""
    types = sequence.types
    return TokenTypes(visual_BT=types.visual_BT, text_BT=types.text_BT & sequence.prompt_BT)


def _never(types: TokenTypes, num_layers: int) -> Tensor:
    """Return exits (B,) where no sample's visual tokens leave."""
    return torch.full_like(types.text_BT[:, 0], num_layers, dtype=torch.long)


def _prefilled(planned: PlannedLayer, prefill: _Prefill, hidden: Tensor, **arguments: Any) -> Tensor:
    """Run a layer and the decision behind it; from the first exit on, rows are packed into (1, N, D)."""
    progress, split = planned.progress, prefill.split
    if split is None:
        output = planned.own(hidden, **arguments)
    else:
        if progress.joined:
            progress.rows_BTD, hidden = hidden, split.flat(hidden)
        planned.shorten_cache(hidden, arguments.get("past_key_values"))
        output = layer_among(planned, split, hidden, **arguments)
    prefill.decide(planned.index, output.flatten(0, 1))
    last = planned.index == len(planned.decoder.layers) - 1
    if last:
        progress.history = replace(progress.history, kept=tuple(prefill.kept))
        progress.history.gathered[_EXITS] = (prefill.exits_B,)
    after, whole = prefill.split, progress.joined or last
    if after is None or (after is split and not whole):
        return output
    # A layer's output is not overwritten: hooks may hold it.
    progress.rows_BTD = output if split is None else split.put(progress.rows_BTD.to(output.device), output)
    return progress.rows_BTD if whole else after.flat(progress.rows_BTD)


def text_state(hidden_TD: Tensor, visual_T: Tensor, text_T: Tensor, mean_over: str) -> Tensor | None:
    """Return what a router reads of one sample, computed plainly; None without an image, where nothing can leave."""
    if not visual_T.any():
        return None
    *earlier, last = text_T.nonzero()[:, 0].tolist()
    if mean_over == "after-image":
        after = int(visual_T.nonzero().max())
        earlier = [position for position in earlier if position > after]
    mean_D = hidden_TD[earlier or [last]].float().mean(0)
    return torch.cat([mean_D, hidden_TD[last].float()])[None]
