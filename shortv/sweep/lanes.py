"""Where an ablation leaves the clean pass, and what its layers are called with from there.

A lane is a set of ablations whose states have the same shape: dense lanes carry every position, the text lane only the
text tokens (`drop-visual` physically removes the rest). Shapes: B batch, T positions, S text positions, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shortv.families import Batch, Decoder
from shortv.families.tokens import Selection, explicit_mask, last_true
from shortv.plan import Mode
from shortv.sweep.clean import CleanPass
from shortv.sweep.passes import PassCounter


class Ablation(NamedTuple):
    """One mode in one layer (for `drop-visual`: in that layer and all later ones)."""

    layer: int
    mode: Mode


class Lane(Protocol):
    """Start states and layer arguments for ablations that can be stacked together."""

    last_B: Tensor
    """Position of each sample's next-token prediction within this lane."""
    length: int
    """Positions of a state."""

    def first(self, ablation: Ablation) -> int:
        """The first layer that the ablation still has to run."""

    def start(self, ablation: Ablation) -> Tensor:
        """The state with which the ablation enters that layer, shape (B, T or S, D)."""

    def arguments(self, layer: int) -> dict[str, Any]:
        """Keyword arguments of a layer for one unstacked batch."""

    def after(self, layer: int) -> Tensor | None:
        """What the model adds to the states of one unstacked batch after a layer, if anything."""

    def count(self, passes: PassCounter, stacked: int) -> None:
        """Count one layer run over so many stacked ablations."""


class DenseLane:
    """Every mode but `drop-visual`: the ablated layer is a selection of rows from kept states."""

    def __init__(self, decoder: Decoder, clean: CleanPass, batch: Batch, passes: PassCounter) -> None:
        self._decoder, self._clean, self._types, self._passes = decoder, clean, batch.types, passes
        self.last_B = batch.types.last_B
        self.length = batch.types.text_BT.shape[1]

    def first(self, ablation: Ablation) -> int:
        return ablation.layer + 1

    def start(self, ablation: Ablation) -> Tensor:
        state_BTD, added_BTD = self._leaving(ablation), self.after(ablation.layer)
        return state_BTD if added_BTD is None else state_BTD + added_BTD

    def _leaving(self, ablation: Ablation) -> Tensor:
        layer, mode = ablation
        entering_BTD, leaving_BTD = self._clean.entering[layer], self._clean.leaving[layer]
        entering_BTD = entering_BTD.to(leaving_BTD.device)
        visual_BT1 = self._types.visual_BT[:, :, None].to(leaving_BTD.device)
        text_BT1 = self._types.text_BT[:, :, None].to(leaving_BTD.device)
        if mode is Mode.FREEZE_VISUAL:
            return torch.where(visual_BT1, entering_BTD, leaving_BTD)
        if mode is Mode.FREEZE_TEXT:
            return torch.where(text_BT1, entering_BTD, leaving_BTD)
        if mode is Mode.NO_VISUAL_FFN:
            return torch.where(visual_BT1, self._clean.middle[layer], leaving_BTD)
        skipped_BTD = self._decoder.ffn_half(self._decoder.layers[layer], entering_BTD)
        self._passes.ffn += 1
        if mode is Mode.SKIP_ATTENTION:
            return skipped_BTD
        if mode is Mode.NO_VISUAL_QUERIES:
            return torch.where(visual_BT1, skipped_BTD, leaving_BTD)
        raise ValueError(f"mode {mode} does not start in a dense lane")

    def arguments(self, layer: int) -> dict[str, Any]:
        return self._clean.arguments[layer]

    def after(self, layer: int) -> Tensor | None:
        return self._clean.between[layer]

    def count(self, passes: PassCounter, stacked: int) -> None:
        passes.layers += stacked


class TextLane:
    """`drop-visual`: text tokens alone from the ablated layer on, at their original positions."""

    def __init__(self, clean: CleanPass, batch: Batch) -> None:
        self._clean = clean
        self._text = Selection.of(batch.types.text_BT)
        self.last_B = last_true(self._text.valid_BS)
        self.length = self._text.valid_BS.shape[1]
        self._squares: dict[int, Tensor] = {}

    def first(self, ablation: Ablation) -> int:
        return ablation.layer

    def start(self, ablation: Ablation) -> Tensor:
        entering_BTD = self._clean.entering[ablation.layer]
        return self._text_on(entering_BTD.device).rows(entering_BTD)

    def arguments(self, layer: int) -> dict[str, Any]:
        arguments = dict(self._clean.arguments[layer])
        arguments["attention_mask"] = self._mask(arguments.get("attention_mask"), self._clean.entering[layer])
        cos, sin = arguments["position_embeddings"]
        text = self._text_on(cos.device)
        arguments["position_embeddings"] = (text.rows(cos), text.rows(sin))
        if isinstance(arguments.get("position_ids"), Tensor):
            arguments["position_ids"] = self._text_on(arguments["position_ids"].device).columns(
                arguments["position_ids"]
            )
        return arguments

    def after(self, layer: int) -> Tensor | None:
        # Only visual rows are added to, and they are gone.
        return None

    def count(self, passes: PassCounter, stacked: int) -> None:
        passes.text_layers += stacked

    def _mask(self, mask: Tensor | None, hidden_BTD: Tensor) -> Tensor:
        # Layers of one kind share one mask object, so its text rows are selected once.
        if id(mask) not in self._squares:
            batch, length = hidden_BTD.shape[:2]
            full = explicit_mask(mask, batch=batch, queries=length, keys=length, device=hidden_BTD.device)
            self._squares[id(mask)] = self._text_on(full.device).square(full)
        return self._squares[id(mask)].to(hidden_BTD.device)

    def _text_on(self, device: torch.device) -> Selection:
        return Selection(index_BS=self._text.index_BS.to(device), valid_BS=self._text.valid_BS.to(device))
