"""Rows that decode together: one prefill, then a token for each row per step, until none is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shortv.families import LoadedModel
from shortv.families.preprocessing import batch_of, positions_of
from shortv.families.vision import VisionCache
from shortv.layers.sequence import keep_rows
from shortv.learned.dyvte.run import exit_layers
from shortv.request import Reason
from shortv.workers.serving.row import Row
from shortv.workers.serving.sampling import Sampler, choose_all
from shortv.workers.serving.transcript import Transcript

NOT_FINITE = "the logits, or what the settings make of them, are not finite numbers"


class RunningBatch:
    """The rows of one plan that share a KV cache. The model must be under their plan whenever this works.

    A row that is done or that nobody waits for leaves with its part of the cache.
    """

    def __init__(self, loaded: LoadedModel, vision: VisionCache, rows: Sequence[Row]) -> None:
        """Prefill, and choose the first token of each row.

        Raises:
            SampleError: a prompt cannot be encoded; encode each alone to find out which.
        """
        self._loaded = loaded
        self.rows = list(rows)
        started = time.monotonic()
        encoded = batch_of(loaded, [row.prompt for row in rows], padding_side="left")
        self._enter(encoded.inputs["input_ids"], encoded.inputs["attention_mask"], started)
        inputs = encoded.on(loaded).inputs
        self._mask_BT = inputs["attention_mask"]
        self._cache = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
        if not self._has_own_positions:
            inputs.setdefault("position_ids", positions_of(self._mask_BT))
        run = rows[0].run
        # Such parts are made of what stands inside the tower.
        by_tower = run is not None and run.needs_tower
        with torch.inference_mode(), nullcontext() if by_tower else vision.reusing(encoded):
            output = loaded.model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._delta_B1 = torch.zeros_like(self._mask_BT[:, :1])
        if self._has_own_positions:
            # The model keeps it for the batch it saw last, and there may be several.
            deltas_B1: Any = loaded.decoder.backbone.rope_deltas
            self._delta_B1 = deltas_B1.to(self._delta_B1)
        logits_BV = output.logits[:, -1].float()
        for row, n_text, n_visual in zip(rows, encoded.types.n_text, encoded.types.n_visual, strict=True):
            row.n_text, row.n_visual = n_text, n_visual
        exits = exit_layers(self._cache)
        for row, layer in zip(rows, exits or (), strict=exits is not None):
            row.exit_layer = layer if row.n_visual else None
        self._choose(logits_BV, prefill_since=started)

    @property
    def _has_own_positions(self) -> bool:
        return not self._loaded.decoder.family.positions_from_mask and bool(self.rows[0].prompt.images)

    def _enter(self, ids_BT: Tensor, mask_BT: Tensor, started: float) -> None:
        tokenizer = self._loaded.processor.tokenizer
        for row, ids_T, mask_T in zip(self.rows, ids_BT, mask_BT, strict=True):
            decoding = row.request.sampling
            ends, texts = self._loaded.end_tokens(decoding.stop)
            prompt = ids_T[mask_T.bool()].tolist()
            row.begin(
                Sampler(decoding, seed=row.seed, prompt=prompt, ends=ends, tokenizer=tokenizer),
                Transcript(tokenizer, stops=texts, ends=ends, limit=self._limit(decoding.max_tokens, len(prompt))),
                waited_until=started,
            )

    def _limit(self, asked: int, prompt: int) -> int:
        return max(1, min(asked, self._loaded.context - prompt))

    def step(self) -> None:
        """Make one token for each row."""
        self._leave()
        if not self.rows:
            return
        device = self._mask_BT.device
        tokens_B1 = torch.tensor([[row.sampler.last] for row in self.rows], device=device)
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
        self._choose(output.logits[:, -1].float())

    def _choose(self, logits_BV: Tensor, prefill_since: float | None = None) -> None:
        chosen = choose_all([row.sampler for row in self.rows], logits_BV)
        if prefill_since is not None:
            # Choosing has waited for the device.
            now = time.monotonic()
            for row in self.rows:
                row.prefill_ms, row.prefilled = 1e3 * (now - prefill_since), now
        for row, one in zip(self.rows, chosen, strict=True):
            if one is None:
                row.fail(Reason.INTERNAL, NOT_FINITE)
            elif not row.over:
                row.add(one)

    def _leave(self) -> None:
        """Let rows go that are over."""
        staying = [index for index, row in enumerate(self.rows) if not row.over]
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in staying]
        if self.rows:
            index_R = torch.tensor(staying, device=self._mask_BT.device)
            keep_rows(self._cache, index_R)
            self._mask_BT, self._delta_B1 = self._mask_BT[index_R], self._delta_B1[index_R]

    @property
    def places(self) -> int:
        """Rows that still run."""
        return sum(not row.over for row in self.rows)
