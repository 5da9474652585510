"""Sequences that decode together: one prefill, then a token for each of them per step, until none is left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from shortv.evals.generation import likelihoods
from shortv.families import LoadedModel
from shortv.families.preprocessing import batch_of, positions_of
from shortv.families.vision import VisionCache
from shortv.layers.cache import keep_rows
from shortv.learned.dyvte.run import exit_layers
from shortv.request import Reason
from shortv.workers.serving.sampling import choose_all
from shortv.workers.serving.sequence import Sequence

NOT_FINITE = "the logits, or what the settings make of them, are not finite numbers"


class RunningBatch:
    """Sequences of one plan that share a KV cache. The model must be under their plan whenever this works.

    A sequence that is finished or cancelled leaves with its part of the cache.
    """

    def __init__(self, loaded: LoadedModel, vision: VisionCache, sequences: Iterable[Sequence]) -> None:
        """Prefill, and choose the first token of each sequence.

        Raises:
            SampleError: a prompt cannot be encoded; encode each alone to find out which.
        """
        self._loaded = loaded
        self.sequences = list(sequences)
        started = time.monotonic()
        encoded = batch_of(loaded, [sequence.prompt for sequence in self.sequences], padding_side="left")
        ids_BT, types = encoded.inputs["input_ids"], encoded.types
        inputs = encoded.on(loaded).inputs
        self._mask_BT = inputs["attention_mask"]
        for at, sequence in enumerate(self.sequences):
            sequence.begin(loaded, ids_BT[at][encoded.inputs["attention_mask"][at].bool()].tolist(), started=started)
            sequence.n_text, sequence.n_visual = types.n_text[at], types.n_visual[at]
        self._cache = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
        run, has_images = self.sequences[0].run, bool(self.sequences[0].prompt.images)
        has_own_positions = has_images and not loaded.decoder.family.positions_from_mask
        if not has_own_positions:
            inputs.setdefault("position_ids", positions_of(self._mask_BT))
        # Such parts read states inside the vision tower, so it has to run.
        by_tower = run is not None and run.needs_tower
        with torch.inference_mode(), nullcontext() if by_tower else vision.reusing(encoded):
            output = loaded.model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._delta_B1 = torch.zeros_like(self._mask_BT[:, :1])
        if has_own_positions:
            # The model keeps it for the batch it saw last, and there may be several.
            deltas_B1: Any = loaded.decoder.backbone.rope_deltas
            self._delta_B1 = deltas_B1.to(self._delta_B1)
        exits = exit_layers(self._cache)
        for sequence, layer in zip(self.sequences, exits or (), strict=exits is not None):
            sequence.exit_layer = layer if sequence.n_visual else None
        self._choose(output, prefill_since=started)

    def step(self) -> None:
        """Generate one token for each sequence."""
        self._leave()
        if not self.sequences:
            return
        device = self._mask_BT.device
        tokens_B1 = torch.tensor([[sequence.sampler.last] for sequence in self.sequences], device=device)
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
        self._choose(output)

    def _choose(self, output: Any, prefill_since: float | None = None) -> None:
        chosen = choose_all([sequence.sampler for sequence in self.sequences], output.logits[:, -1].float())
        # Choosing has waited for the device.
        now = time.monotonic()
        for sequence, one in zip(self.sequences, chosen, strict=True):
            if prefill_since is not None:
                sequence.prefill_ms, sequence.prefilled_at = 1e3 * (now - prefill_since), now
            if one is None:
                sequence.fail(Reason.INTERNAL, NOT_FINITE)
            elif not sequence.over:
                sequence.add(one)

    def _leave(self) -> None:
        """Remove sequences that are finished or cancelled."""
        staying = [index for index, one in enumerate(self.sequences) if not one.over]
        if len(staying) == len(self.sequences):
            return
        self.sequences = [self.sequences[index] for index in staying]
        if self.sequences:
            index_R = torch.tensor(staying, device=self._mask_BT.device)
            keep_rows(self._cache, index_R)
            self._mask_BT, self._delta_B1 = self._mask_BT[index_R], self._delta_B1[index_R]

    @property
    def size(self) -> int:
        """Sequences that still run."""
        return sum(not sequence.over for sequence in self.sequences)


def score(loaded: LoadedModel, sequences: Iterable[Sequence]) -> None:
    """Finish sequences with the log-likelihood of their requests' continuations, in one forward.

    Raises:
        ShortVError: a continuation cannot be scored; score each alone to find out which.
    """
    sequences = list(sequences)
    prompts = [replace(one.prompt, continuation=one.request.continuation or "") for one in sequences]
    for one, found in zip(sequences, likelihoods(loaded, prompts), strict=True):
        if math.isnan(found.log_probability):
            one.fail(Reason.INTERNAL, NOT_FINITE)
        else:
            one.finish(found)
