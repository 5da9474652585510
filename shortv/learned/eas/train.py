"""Training of EAS's adapters on a frozen model, and the search for the layers that skip their attention.

The search is a bandit with a score for each layer, played with sets of layers while adapters of all layers train (paper
and released code, which differ in places between LaVIN and LLaVA; the recipe names them). The chosen layers then get
fresh adapters. Shapes: L layers, K candidates, N answer tokens of all samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.families.supervised import IGNORED, Supervised
from shortv.layers.apply import executing
from shortv.layers.progress import prompted
from shortv.learned.eas.parts import Adapters
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.eas.run import AdaptedRun
from shortv.learned.system import Reduce, alone, learning_rate
from shortv.learned.training import Trainer, answer_logits, generator
from shortv.plan import Mode, modes_of_layers
from shortv.sample import Sample

Candidate = tuple[int, ...]
"""Layers whose attention is skipped together, in ascending order."""
_SHARPNESS = 10.0
_TRIES = 50
"""Draws for each candidate of a round."""
_SCORES, _SEARCHING = "search/scores", "search/running"


class Search:
    """Scores of the layers. What is drawn depends on scores, seed and step alone."""

    def __init__(self, recipe: EasRecipe, num_layers: int) -> None:
        """Start with equal scores. Raises Refused where so many skipped layers leave no choice."""
        self._recipe, self._num_layers, self._skip = recipe, num_layers, recipe.count(num_layers)
        if not 0 < self._skip < num_layers:
            raise Refused(f"a search for {self._skip} of {num_layers} layers has no choice; skip fewer, or some")
        self.scores_L = torch.zeros(num_layers, dtype=torch.float64)

    @property
    def probability_L(self) -> Tensor:
        """What sets are drawn in proportion to."""
        if self._recipe.probability == "softmax":
            return (_SHARPNESS * self.scores_L).softmax(0)
        return self.scores_L.sigmoid()

    def size(self, step: int) -> int:
        """Return the layers of a set at a training step."""
        if not self._recipe.grows or not self._recipe.quiet:
            return self._skip
        return min(self._skip, 2 * self._skip * step // self._recipe.quiet + 1)

    def drawn(self, step: int) -> Candidate:
        """Return the layers that a training step skips."""
        return _drawn(self.probability_L, self.size(step), generator(self._recipe.seed, step, "skip"))

    def is_round(self, step: int) -> bool:
        """Whether candidates are compared before that training step."""
        past = step - self._recipe.quiet
        return past >= 0 and past % self._recipe.every == 0

    def candidates(self, step: int) -> tuple[Candidate, ...]:
        """Return the distinct sets of a round; fewer than the recipe says where (almost) no more exist."""
        draw = generator(self._recipe.seed, step, "candidates")
        most = min(self._recipe.candidates, math.comb(self._num_layers, self.size(step)))
        found: dict[Candidate, None] = {}
        for probability_L in (self.probability_L, torch.ones_like(self.scores_L)):
            # Scores that are far apart draw hardly any set but one; then uniform draws find the others.
            tries = _TRIES * most
            while len(found) < most and tries:
                found[_drawn(probability_L, self.size(step), draw)] = None
                tries -= 1
        return tuple(found)

    def update(self, candidates: Sequence[Candidate], losses: Sequence[float]) -> None:
        """s_i += eta (r - mean r) p_i (1 - p_i) for every layer i of every candidate, with reward r = exp(-loss).

        Args:
            losses: of each candidate, in nats per token, all on the same held-out samples.

        Raises:
            ShortVError: a loss is not finite.
        """
        bad = [loss for loss in losses if not math.isfinite(loss)]
        if bad:
            raise ShortVError(f"a candidate of the search has loss {bad[0]}; lower the learning rate")
        rewards_K = torch.tensor(losses, dtype=torch.float64).neg().exp()
        advantages_K = rewards_K - rewards_K.mean()
        slope_L = self.probability_L * (1 - self.probability_L)
        for candidate, advantage in zip(candidates, advantages_K, strict=True):
            layers = list(candidate)
            self.scores_L[layers] += self._recipe.eta * advantage * slope_L[layers]

    def chosen(self) -> Candidate:
        """Return the layers of highest score, as many as are to be skipped."""
        return tuple(sorted(ranked(self.scores_L.tolist())[: self._skip]))


def _drawn(probability_L: Tensor, size: int, draw: torch.Generator) -> Candidate:
    # multinomial refuses to draw what has a probability of exactly 0.
    layers_N = torch.multinomial(probability_L.clamp(min=1e-12), size, replacement=False, generator=draw)
    return tuple(sorted(layers_N.tolist()))


def ranked(scores: Sequence[float]) -> tuple[int, ...]:
    """Return layers by score, the most redundant first; of equal ones the deeper first."""
    return tuple(sorted(range(len(scores)), key=lambda layer: (-scores[layer], -layer)))


class AdapterTrainer(Trainer[Adapters]):
    """Trains adapters; z and routing weights come from prompts alone."""

    parts_class = Adapters

    def __init__(self, loaded: LoadedModel, recipe: EasRecipe, reduce: Reduce = alone) -> None:
        """Build the first adapters. Raises Refused for a family or layers that cannot have them."""
        super().__init__(loaded, recipe, reduce)
        self._layers = tuple(range(len(loaded.decoder.layers)))
        self._search = Search(recipe, len(self._layers)) if recipe.searching else None
        self._searching = bool(recipe.searching)
        self._build()

    def _build(self) -> None:
        """Make fresh adapters and a fresh optimizer for the search, or for what it has chosen."""
        recipe, search = self._recipe, self._search
        if self._searching:
            self._begin(recipe.settings(kept=self._layers, skipped=self._layers))
        else:
            chosen = search.chosen() if search else recipe.fixed_layers(len(self._layers))
            kept = tuple(layer for layer in self._layers if layer not in chosen)
            scores = tuple(round(score, 6) for score in search.scores_L.tolist()) if search else ()
            self._begin(recipe.settings(kept=kept, skipped=chosen, scores=scores))

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step; in the search, play a round before it when one is due.

        All workers skip the same layers. They evaluate a round's candidates each on its own samples, and the losses
        are averaged over them.

        Returns:
            `loss` in nats per answer token (not finite: nothing was changed), `gradient_norm` before clipping,
            `learning_rate`, and `skipped`, the number of skipped layers.

        Raises:
            SampleError: a sample has no answer or cannot be encoded; nothing was changed.
            ShortVError: a candidate's loss is not finite.
        """
        searching = step < self._recipe.searching
        trained, rewarding = self._divided(samples) if searching else (samples, ())
        given, held_out = (self.encoded(some) if some else None for some in (trained, rewarding))
        if self._searching and not searching:
            self._searching = False
            self._build()
        skipped: Candidate = self._parts.settings.skipped
        if searching and self._search is not None:
            if self._search.is_round(step):
                candidates = self._search.candidates(step)
                self._search.update(candidates, self._losses(candidates, held_out))
            skipped = self._search.drawn(step)
        # All of this worker's samples may be held out: then it has no gradients.
        with torch.set_grad_enabled(given is not None):
            total, tokens = self._loss(given or held_out, skipped)
        loss, rate, weights = total / max(1, tokens), self._rate(step), list(self._parts.parameters())
        self._backward(loss, weights)
        norm = self._update(weights, rate, gradient_norm=self._recipe.gradient_norm)
        value = float(loss.detach()) if math.isfinite(norm) else math.nan
        return {"loss": value, "gradient_norm": norm, "learning_rate": rate, "skipped": float(len(skipped))}

    def _rate(self, step: int) -> float:
        recipe, first, peak = self._recipe, self._recipe.searching, self._recipe.learning_rate
        steps, warmup = recipe.steps - first, recipe.warmup_steps
        if step < first:
            return learning_rate(step, steps=first, peak=recipe.search_learning_rate, warmup_steps=min(warmup, first))
        return learning_rate(step - first, steps=steps, peak=peak, warmup_steps=warmup)

    def _divided(self, samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Samples to train on and samples to reward on; by id, so that none is ever on the other side."""
        share = self._recipe.held_out
        if not share:
            return samples, samples
        held = [_place(sample.sample_id, self._recipe.seed) < share for sample in samples]
        return list(compress(samples, (not found for found in held))), list(compress(samples, held))

    @torch.no_grad()
    def _losses(self, candidates: Sequence[Candidate], held_out: Supervised | None) -> list[float]:
        """Return the loss of each candidate over the held-out samples of all workers."""
        totals, tokens = zip(*(self._loss(held_out, candidate) for candidate in candidates), strict=True)
        # Workers average gradients, so all totals and one count travel as the gradient of a weight.
        shared = nn.Parameter(torch.zeros(len(totals) + 1, dtype=torch.float64, device=self._loaded.device))
        shared.grad = torch.tensor([*map(float, totals), tokens[0]], dtype=torch.float64, device=shared.device)
        self._reduce([shared])
        *means, mean_tokens = shared.grad.tolist()
        # A round without held-out samples compares nothing, and changes no score.
        return [mean / max(mean_tokens, 1e-9) if mean_tokens else 0.0 for mean in means]

    def _loss(self, given: Supervised | None, skipped: Candidate) -> tuple[Tensor, int]:
        """Return the sum over answer tokens, in nats, and how many they are."""
        if given is None:
            return torch.zeros(()), 0
        modes = modes_of_layers(Mode.SKIP_ATTENTION, skipped, len(self._layers))
        prompt_BT = (given.labels_BT != IGNORED).int().cumsum(1) == 0
        decoder = self._loaded.decoder
        run = AdaptedRun(decoder, modes, self._parts)
        with executing(self._loaded.model, modes, run), prompted(decoder, prompt_BT):
            logits_NV, labels_N = answer_logits(self._loaded, given)
        return cross_entropy(logits_NV.float(), labels_N, reduction="sum"), len(labels_N)

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments of AdamW, the scores, and whether the search is running: flat, on the CPU."""
        state = super().state()
        if self._search is not None:
            state[_SCORES] = self._search.scores_L.clone()
            state[_SEARCHING] = torch.tensor(self._searching)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned. Raises ShortVError when it does not fit."""
        if self._search is not None:
            scores_L, searching = state.get(_SCORES), state.get(_SEARCHING)
            if scores_L is None or searching is None or scores_L.shape != self._search.scores_L.shape:
                raise ShortVError("the checkpoint has no scores of a search in this model; train into another folder")
            self._search.scores_L = scores_L.double().clone()
            self._searching = bool(searching)
            self._build()
        super().restore(state)


def _place(sample_id: str, seed: int) -> float:
    """Return a number from 0 to below 1 that a sample keeps in every run with the seed."""
    digest = hashlib.sha256(f"{seed}-held-out-{sample_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
