"""What the planned layers of one model share during a forward: token types, rows and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from shortv.errors import ShortVError
from shortv.families import Decoder
from shortv.layers.rows import Selection, Split, may_attend
from shortv.layers.run import LearnedRun
from shortv.layers.sequence import SequenceState
from shortv.plan import Mode, Tokens


class Progress(SequenceState):
    """The current forward, as the fast executors need it."""

    def __init__(self, decoder: Decoder, config: Any, modes: Sequence[Mode], run: LearnedRun | None = None) -> None:
        super().__init__(decoder, modes, run)
        self._configs = (config, config.get_text_config())
        self.length = 0
        """Positions of this forward."""
        self.joined = False
        """Whether every layer has to return all rows, because the caller asked for hidden states."""
        self._forget()

    def _forget(self) -> None:
        self.rows_BTD = torch.empty(0)
        """All rows, as the current run of layers found them or left them."""
        self._splits: dict[Tokens, Split] = {}
        self._columns: dict[tuple[int, int | None, int], tuple[Tensor | None, Tensor]] = {}

    def observe(self, call: dict[str, Any]) -> None:
        """Begin a forward with these arguments."""
        if isinstance(call.get("past_key_values"), StaticCache):
            raise ShortVError("a static cache has no room for layers of different lengths; use the dynamic cache")
        if self._is_requested("output_attentions", call):
            raise ShortVError("a plan does not compute the attention of every row; leave output_attentions off")
        super().observe(call)
        self.length = self.types.text_BT.shape[1]
        self.joined = self._is_requested("output_hidden_states", call)
        self._forget()

    def _is_requested(self, output: str, call: dict[str, Any]) -> bool:
        return bool(call.get(output) or any(getattr(config, output, False) for config in self._configs))

    def _release(self) -> None:
        self._forget()
        super()._release()

    def split(self, tokens: Tokens) -> Split:
        """Return the rows of these tokens; layers of one forward share it."""
        if tokens not in self._splits:
            self._splits[tokens] = Split(self.types.among(tokens))
        return self._splits[tokens]

    def kept_columns(
        self, attention: nn.Module, mask: Tensor | None, device: torch.device, prompt: Selection | None = None
    ) -> Tensor:
        """Return the columns of the model's own mask for a layer that keeps some positions: (B, 1, T, kept).

        Layers of one kind receive the same mask and share the result.

        Args:
            prompt: positions of the prompt that the layer keeps; its text by default.
        """
        prompt = self.history.prompt if prompt is None else prompt
        key = (id(mask), getattr(attention, "sliding_window", None), id(prompt))
        if key not in self._columns:
            self._columns[key] = (mask, self._left_columns(attention, mask, device, prompt))
        return self._columns[key][1]

    def _left_columns(
        self, attention: nn.Module, mask: Tensor | None, device: torch.device, prompt: Selection
    ) -> Tensor:
        kept_BS, valid_BS = self._kept(device, prompt)
        full = self.mask_of(attention, mask, device)
        column_BS = kept_BS - (self.visual_BK.shape[1] - full.shape[3])
        seen_BS = valid_BS & (column_BS >= 0)
        index = column_BS.clamp(min=0)[:, None, None, :].expand(-1, full.shape[1], self.length, -1)
        columns = full.expand(len(kept_BS), -1, -1, -1).gather(3, index)
        allowed = may_attend(columns) & seen_BS[:, None, None, :]
        if columns.dtype == torch.bool:
            return allowed
        return columns.masked_fill(~allowed, torch.finfo(columns.dtype).min)

    def _kept(self, device: torch.device, prompt: Selection) -> tuple[Tensor, Tensor]:
        """Return the original positions of a layer's K and V in their order, and which of them are not padding."""
        index_BS, valid_BS = prompt.index_BS.to(device), prompt.valid_BS.to(device)
        batch, keys = self.visual_BK.shape
        generated = torch.arange(self.history.prompt_length, keys, device=device).expand(batch, -1)
        kept_BS = torch.cat([index_BS, generated], dim=1)
        return kept_BS, torch.cat([valid_BS, torch.ones_like(generated, dtype=torch.bool)], dim=1)
