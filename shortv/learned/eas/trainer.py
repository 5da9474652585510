"""Training of adapters on a frozen model: with other layers skipped in each step of the search, then with the chosen.

Shapes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.errors import ShortVError
from shortv.families import LoadedModel
from shortv.families.parts import Learned
from shortv.families.parts.eas import Eas
from shortv.families.prompted import prompted
from shortv.families.supervised import IGNORED, Supervised, supervised
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.eas.search import Candidate, Search
from shortv.learned.trainer import (
    Executing,
    Reduce,
    alone,
    flat_state,
    learning_rate,
    restore_flat_state,
    seeded,
    set_learning_rate,
)
from shortv.plan import Mode, modes_of_layers
from shortv.sample import Sample

_SCORES, _SEARCHES = "search/scores", "search/running"


def make_trainer(
    loaded: LoadedModel, recipe: EasRecipe, *, executing: Executing, reduce: Reduce = alone
) -> AdapterTrainer:
    """Set up the training of a model's adapters.

    Raises:
        Refused: a family whose FFN no adapter can be folded into, or layers that the model has not.
    """
    return AdapterTrainer(loaded, recipe, executing=executing, reduce=reduce)


class _Loss(NamedTuple):
    """Summed over answer tokens, in nats, and how many they are."""

    total: Tensor
    tokens: int


class AdapterTrainer:
    """A Trainer of EAS's adapters. The model itself is not changed; z and routing weights come from prompts alone."""

    def __init__(self, loaded: LoadedModel, recipe: EasRecipe, *, executing: Executing, reduce: Reduce) -> None:
        """Build the first adapters; see `make_trainer`."""
        self.steps, self.batch_size = recipe.steps, recipe.batch_size
        self._loaded, self._recipe, self._executing, self._reduce = loaded, recipe, executing, reduce
        self._layers = tuple(range(len(loaded.decoder.layers)))
        self._search = Search(recipe.search(len(self._layers))) if recipe.searching else None
        self._searches = bool(recipe.searching)
        self._build()

    def _build(self) -> None:
        """Fresh adapters and a fresh optimizer for the search, or for what it has chosen."""
        if self._searches:
            settings = self._recipe.settings(kept=self._layers, skipped=self._layers)
        else:
            chosen = self._search.chosen() if self._search else self._recipe.fixed_layers(len(self._layers))
            kept = tuple(layer for layer in self._layers if layer not in chosen)
            scores = tuple(round(score, 6) for score in self._search.scores_L.tolist()) if self._search else ()
            settings = self._recipe.settings(kept=kept, skipped=chosen, scores=scores)
        with seeded(self._recipe.seed, self._loaded.device):
            self._parts = Eas.build(self._loaded.decoder, settings)
        self._optimizer = _optimizer(self._parts, self._recipe)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step; in the search, play a round before it when one is due.

        All workers skip the same layers. They evaluate a round's candidates each on its own samples, and the losses
        are averaged over them.

        Returns:
            `loss` in nats per answer token (not finite: nothing was changed), `gradient_norm` before clipping,
            `learning_rate`, and `skipped`, the number of skipped layers.

        Raises:
            SampleError: a sample has no answer or cannot be encoded; nothing is changed then.
            ShortVError: a candidate's loss is not finite.
        """
        searches = step < self._recipe.searching
        trained, rewarding = self._divided(samples) if searches else (samples, ())
        given, held_out = (self._encoded(some) for some in (trained, rewarding))
        if self._searches and not searches:
            self._searches = False
            self._build()
        if searches and self._search is not None:
            if self._search.is_round(step):
                self._search.play(step, lambda candidates: self._losses(candidates, held_out))
            skipped = self._search.drawn(step)
        else:
            skipped = self._parts.settings.skipped
        return self._descend(given, held_out, skipped, step)

    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample."""
        self._encoded([sample])

    def _descend(
        self, given: Supervised | None, held_out: Supervised | None, skipped: Candidate, step: int
    ) -> dict[str, float]:
        rate = self._rate(step)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        if given is not None:
            loss = self._loss(given, skipped)
            mean = loss.total / loss.tokens
            mean.backward()  # type: ignore[no-untyped-call]
        else:  # all of this worker's samples are held out
            loss = self._measured(held_out, skipped)
            mean = loss.total / max(1, loss.tokens)
        weights = list(self._parts.parameters())
        self._reduce(weights)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self._recipe.gradient_norm))
        # After averaging the norm is the same on all workers, and they stop together.
        if math.isfinite(norm):
            self._optimizer.step()
        found = float(mean.detach()) if math.isfinite(norm) else math.nan
        return {"loss": found, "gradient_norm": norm, "learning_rate": rate, "skipped": float(len(skipped))}

    def _rate(self, step: int) -> float:
        recipe, first = self._recipe, self._recipe.searching
        if step < first:
            return learning_rate(
                step, steps=first, peak=recipe.search_learning_rate, warmup_steps=min(recipe.warmup_steps, first)
            )
        return learning_rate(
            step - first, steps=recipe.steps - first, peak=recipe.learning_rate, warmup_steps=recipe.warmup_steps
        )

    def _divided(self, samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Samples to train on and samples to reward on; by id, so that none is ever on the other side."""
        share = self._recipe.held_out
        if not share:
            return samples, samples
        held = [_place(sample.sample_id, self._recipe.seed) < share for sample in samples]
        trained, held_out = (
            [sample for sample, found in zip(samples, held, strict=True) if found is side] for side in (False, True)
        )
        return trained, held_out

    def _encoded(self, samples: Sequence[Sample]) -> Supervised | None:
        return supervised(self._loaded, samples, padding_side="left") if samples else None

    def _losses(self, candidates: Sequence[Candidate], held_out: Supervised | None) -> list[float]:
        """Loss of each candidate over the held-out samples of all workers."""
        found = [self._measured(held_out, candidate) for candidate in candidates]
        # Gradients are what workers can average: all totals and one count, as if they were those of a weight.
        shared = nn.Parameter(torch.zeros(len(found) + 1, dtype=torch.float64, device=self._loaded.device))
        values = [float(loss.total) for loss in found] + [float(found[0].tokens)]
        shared.grad = torch.tensor(values, dtype=torch.float64, device=shared.device)
        self._reduce([shared])
        *totals, tokens = shared.grad.tolist()
        # A round that none of the batch's samples is held out for compares nothing, and changes no score.
        return [total / max(tokens, 1e-9) if tokens else 0.0 for total in totals]

    @torch.no_grad()
    def _measured(self, given: Supervised | None, skipped: Candidate) -> _Loss:
        return _Loss(torch.zeros(()), 0) if given is None else self._loss(given, skipped)

    def _loss(self, given: Supervised, skipped: Candidate) -> _Loss:
        modes = modes_of_layers(Mode.SKIP_ATTENTION, skipped, len(self._layers))
        answer_BT = given.labels_BT != IGNORED
        # Padded on the left, so answers stand at the end; the token before each predicts it.
        keep = answer_BT.shape[1] - int(answer_BT.any(0).int().argmax()) + 1
        prompt_BT = answer_BT.int().cumsum(1) == 0
        model, learned = self._loaded.model, Learned(parts=self._parts)
        with self._executing(model, modes, learned), prompted(self._loaded.decoder, prompt_BT):
            logits_BTV = model(**given.batch.inputs, use_cache=False, logits_to_keep=keep).logits
        labels_BT = given.labels_BT[:, 1 - keep :].to(logits_BTV.device)
        total = cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return _Loss(total, int((labels_BT != IGNORED).sum()))

    def state(self) -> dict[str, Tensor]:
        """Weights and moments of AdamW, the scores, and whether the search is running: flat, on the CPU."""
        state = flat_state(dict(self._parts.named_parameters()), self._optimizer)
        if self._search is not None:
            state[_SCORES] = self._search.scores_L.clone()
            state[_SEARCHES] = torch.tensor(self._searches)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises ShortVError when it does not fit."""
        if self._search is not None:
            scores_L, searches = state.get(_SCORES), state.get(_SEARCHES)
            if scores_L is None or searches is None or scores_L.shape != self._search.scores_L.shape:
                raise ShortVError("the checkpoint has no scores of a search in this model; train into another folder")
            self._search.scores_L = scores_L.double().clone()
            self._searches = bool(searches)
            self._build()
        restore_flat_state(state, dict(self._parts.named_parameters()), self._optimizer)

    def parts(self) -> Eas:
        """The adapters as trained so far; their settings have the scores once the search has ended."""
        return self._parts


def _optimizer(parts: Eas, recipe: EasRecipe) -> torch.optim.AdamW:
    weights = list(parts.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _place(sample_id: str, seed: int) -> float:
    """A number from 0 to below 1 that is a sample's own."""
    digest = hashlib.sha256(f"{seed}-held-out-{sample_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
