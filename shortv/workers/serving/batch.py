"""Sequences that decode together: one prefill, then a token for each of them per step, until none is left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from shortv.evals.generation import scored
from shortv.families import LoadedModel
from shortv.families.preprocessing import join
from shortv.families.vision import TowerTimes, VisionCache
from shortv.request import Reason
from shortv.workers.serving.forward import CachedForward
from shortv.workers.serving.sampling import choose_all
from shortv.workers.serving.sequence import Sequence

NOT_FINITE = "the logits, or what the settings make of them, are not finite numbers"


class RunningBatch:
    """Sequences of one plan that share a KV cache. The model must be under their plan whenever this works.

    A sequence that is finished or cancelled leaves with its part of the cache.
    """

    def __init__(self, loaded: LoadedModel, vision: VisionCache, sequences: Iterable[Sequence]) -> None:
        """Prefill, and choose the first token of each sequence."""
        self.sequences = list(sequences)
        started = time.monotonic()
        for sequence in self.sequences:
            sequence.begin(loaded, sequence.prepared.encoded.ids, started=started)
        encoded = [sequence.prepared.encoded for sequence in self.sequences]
        self._forward = CachedForward(loaded, vision, encoded, self.sequences[0].run)
        _note_prefill(self.sequences, self._forward.prefill_ms, self._forward.tower)
        exits = self._forward.exits
        for sequence, layer in zip(self.sequences, exits or (), strict=exits is not None):
            sequence.exit_layer = layer if sequence.prepared.encoded.n_visual else None
        self._choose(started, after_prefill=True)

    def step(self) -> None:
        """Generate one token for each sequence."""
        started = time.monotonic()
        self._leave()
        if self.sequences:
            self._forward.step([sequence.sampler.last for sequence in self.sequences])
            self._choose(started)

    def _choose(self, started: float, *, after_prefill: bool = False) -> None:
        chosen = choose_all([sequence.sampler for sequence in self.sequences], self._forward.logits_BV)
        # Choosing has waited for the device.
        now = time.monotonic()
        share_ms = 1e3 * (now - started) / len(self.sequences)
        for sequence, one in zip(self.sequences, chosen, strict=True):
            sequence.busy_ms += share_ms
            if after_prefill:
                sequence.prefilled_at = now
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
            self._forward.keep(staying)

    @property
    def size(self) -> int:
        """Sequences that still run."""
        return sum(not sequence.over for sequence in self.sequences)


def score(loaded: LoadedModel, vision: VisionCache, sequences: Iterable[Sequence]) -> None:
    """Finish sequences with the log-likelihood of their requests' continuations, in one forward."""
    sequences = list(sequences)
    started = time.monotonic()
    for sequence in sequences:
        sequence.queue_ms = 1e3 * (started - sequence.arrived)
    run = sequences[0].run
    by_tower = run is not None and run.needs_tower
    encoded = [sequence.prepared.encoded for sequence in sequences]
    batch = join(loaded, encoded, padding_side="left", pixels=by_tower)
    with vision.reusing(batch, own=by_tower) as tower:
        found = scored(loaded, batch, [sequence.prepared.continuation for sequence in sequences])
    took_ms = 1e3 * (time.monotonic() - started)
    _note_prefill(sequences, took_ms - tower.now_ms, tower)
    for sequence, likelihood in zip(sequences, found, strict=True):
        sequence.busy_ms += took_ms / len(sequences)
        if math.isnan(likelihood.log_probability):
            sequence.fail(Reason.INTERNAL, NOT_FINITE)
        else:
            sequence.end_scored(likelihood)


def _note_prefill(sequences: Iterable[Sequence], prefill_ms: float, tower: TowerTimes) -> None:
    sequences = list(sequences)
    for sequence in sequences:
        sequence.prefill_ms, sequence.prefill_batch = prefill_ms, len(sequences)
        sequence.vision_ms = sum(tower.by_image.get(image, 0.0) for image in sequence.prepared.images)
