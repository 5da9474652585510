"""Which token comes next: greedy or sampled, for each sequence alone, so that its batch does not change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shortv.request import SamplingParams, TokenLogprob


class Chosen(NamedTuple):
    """A token, and its log-probability if that is requested."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """Chooses the tokens of one completion from float32 logits.

    The order of adjustments is that of transformers' `generate`: repetition penalty, minimum length, temperature,
    top-k, top-p. Log-probabilities are the model's own, before any of them. `seed` is for parameters without one.
    """

    def __init__(
        self, sampling: SamplingParams, *, seed: int, prompt: Sequence[int], ends: Sequence[int], tokenizer: Any
    ) -> None:
        self._sampling = sampling
        self._ids = list(prompt)
        self._generated = 0
        self._ends = list(ends)
        self._tokenizer = tokenizer
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None
        )
        self._warpers = _warpers(sampling) if sampling.temperature > 0 else []
        # On the CPU, so that a seed means the same on every device.
        self._generator = torch.Generator()
        self._generator.manual_seed(seed if sampling.seed is None else sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest one and nothing else is requested."""
        sampling = self._sampling
        too_short = self._generated < sampling.min_tokens
        return not (self._warpers or self._penalty or too_short or sampling.top_logprobs is not None)

    @property
    def last(self) -> int:
        """The token chosen last."""
        return self._ids[-1]

    def take(self, token: int) -> None:
        """Record the chosen token."""
        self._ids.append(token)
        self._generated += 1

    def choose(self, logits_V: Tensor) -> Chosen | None:
        """Choose the next token; None if the settings leave no finite probabilities to sample from."""
        ids_1T = torch.tensor([self._ids], device=logits_V.device)
        scores_1V = logits_V[None].float()
        if self._penalty is not None:
            scores_1V = self._penalty(ids_1T, scores_1V)
        if self._generated < self._sampling.min_tokens:
            scores_1V = scores_1V.clone()
            scores_1V[:, self._ends] = -torch.inf
        for warper in self._warpers:
            scores_1V = warper(ids_1T, scores_1V)
        if self._warpers:
            probabilities_V = scores_1V[0].softmax(-1).cpu()
            if not bool(probabilities_V.isfinite().all()):
                return None
            token = int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        else:
            token = int(scores_1V.argmax())
        return Chosen(token, self._logprob(logits_V, token))

    def _logprob(self, logits_V: Tensor, token: int) -> TokenLogprob | None:
        count = self._sampling.top_logprobs
        if count is None:
            return None
        logprobs_V = logits_V.float().log_softmax(-1)
        best = logprobs_V.topk(min(count, len(logprobs_V)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(
            self._text(token), float(logprobs_V[token]), tuple((self._text(other), value) for other, value in top)
        )

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def _warpers(sampling: SamplingParams) -> list[Any]:
    # Lower temperatures choose the same token, until the division overflows.
    warpers: list[Any] = [TemperatureLogitsWarper(max(sampling.temperature, 1e-6))]
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def choose_all(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[Chosen | None]:
    """Choose the next token of each sequence, None where its logits are not finite.

    Sequences that only need the likeliest token share one search.
    """
    best = logits_BV.max(-1)
    finite_B, best_B = best.values.isfinite().tolist(), best.indices.tolist()
    chosen: list[Chosen | None] = []
    for sampler, finite, token, logits_V in zip(samplers, finite_B, best_B, logits_BV, strict=True):
        one = None
        if finite:
            one = Chosen(token, None) if sampler.plain else sampler.choose(logits_V)
        if one is not None:
            sampler.take(one.token)
        chosen.append(one)
    return chosen
