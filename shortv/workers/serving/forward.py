"""The forwards of sequences that share a KV cache: one prefill, then a token of each per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shortv.families import LoadedModel
from shortv.families.preprocessing import EncodedPrompt, join, positions_of
from shortv.families.vision import VisionCache
from shortv.layers.cache import keep_rows
from shortv.layers.progress import LearnedRun
from shortv.learned.dyvte.run import exit_layers


class CachedForward:
    """A prefill and the steps after it; the model must be under the same plan in all of them.

    `logits_BV` are those after the last forward, in float32. `prefill_ms` is the time of the language model alone, and
    `tower` that of the vision tower; the device is synchronised before and after both.
    """

    def __init__(
        self, loaded: LoadedModel, vision: VisionCache, encoded: Sequence[EncodedPrompt], run: LearnedRun | None = None
    ) -> None:
        """Prefill prompts, which must all have images or all have none; `run` is what the plan has learned, if any."""
        self._loaded = loaded
        # Such parts read states inside the vision tower, so it has to run.
        by_tower = run is not None and run.needs_tower
        batch = join(loaded, encoded, padding_side="left", pixels=by_tower)
        inputs = batch.on(loaded).inputs
        self._mask_BT = inputs["attention_mask"]
        self._cache = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
        has_own_positions = encoded[0].n_visual > 0 and not loaded.decoder.family.positions_from_mask
        if not has_own_positions:
            inputs.setdefault("position_ids", positions_of(self._mask_BT))
        loaded.synchronize()
        started = time.perf_counter()
        with torch.inference_mode(), vision.reusing(batch, own=by_tower) as self.tower:
            output = loaded.model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        loaded.synchronize()
        self.prefill_ms = 1e3 * (time.perf_counter() - started) - self.tower.now_ms
        self.logits_BV: Tensor = output.logits[:, -1].float()
        self._delta_B1 = torch.zeros_like(self._mask_BT[:, :1])
        if has_own_positions:
            # The model keeps it for the batch it saw last, and there may be several.
            deltas_B1: Any = loaded.decoder.backbone.rope_deltas
            self._delta_B1 = deltas_B1.to(self._delta_B1)

    @property
    def exits(self) -> list[int] | None:
        """The layer after which the visual tokens of each sequence left, under a plan that decides it for each."""
        return exit_layers(self._cache)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        layers: list[Any] = self._cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    def step(self, tokens: Sequence[int]) -> None:
        """Run one token of each sequence."""
        tokens_B1 = torch.tensor([[token] for token in tokens], device=self._mask_BT.device)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(tokens_B1)], dim=1)
        with torch.inference_mode():
            output = self._loaded.model(
                input_ids=tokens_B1,
                attention_mask=self._mask_BT,
                position_ids=self._mask_BT.sum(1, keepdim=True) - 1 + self._delta_B1,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits_BV = output.logits[:, -1].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all other sequences."""
        index_R = torch.tensor(rows, device=self._mask_BT.device)
        keep_rows(self._cache, index_R)
        self._mask_BT, self._delta_B1 = self._mask_BT[index_R], self._delta_B1[index_R]
