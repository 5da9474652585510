"""Which token comes next: greedy or sampled, for each sequence alone, so that its batch does not change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
        self._min_ids = len(self._ids) + sampling.min_tokens
        self._ends = list(ends)
        self._tokenizer = tokenizer
        self._penalties, self._warpers = LogitsProcessorList(), LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature > 0:
            # Lower temperatures choose the same token, until the division overflows.
            self._warpers.append(TemperatureLogitsWarper(max(sampling.temperature, 1e-6)))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        # On the CPU, so that a seed means the same on every device.
        self._generator = torch.Generator().manual_seed(seed if sampling.seed is None else sampling.seed)

    @property
    def last(self) -> int:
        """The token chosen last."""
        return self._ids[-1]

    def choose(self, logits_V: Tensor, likeliest: int) -> Chosen | None:
        """Choose the next token; None if the settings leave no finite probabilities to sample from."""
        token = likeliest
        too_short = len(self._ids) < self._min_ids
        if self._penalties or self._warpers or too_short:
            ids_1T: Any = torch.tensor([self._ids], device=logits_V.device)
            scores_1V = self._penalties(ids_1T, logits_V[None].float())
            if too_short:
                scores_1V = scores_1V.clone()
                scores_1V[:, self._ends] = -torch.inf
            scores_V = self._warpers(ids_1T, scores_1V)[0]
            token = int(scores_V.argmax())
            if self._warpers:
                probabilities_V = scores_V.softmax(-1).cpu()
                if not bool(probabilities_V.isfinite().all()):
                    return None
                token = int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        self._ids.append(token)
        return Chosen(token, self._logprob(logits_V, token))

    def _logprob(self, logits_V: Tensor, token: int) -> TokenLogprob | None:
        count = self._sampling.top_logprobs
        if count is None:
            return None
        logprobs_V = logits_V.float().log_softmax(-1)
        best = logprobs_V.topk(min(count, len(logprobs_V)))
        top = zip(map(self._text, best.indices.tolist()), best.values.tolist(), strict=True)
        return TokenLogprob(self._text(token), float(logprobs_V[token]), tuple(top))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def choose_all(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[Chosen | None]:
    """Choose the next token of each sequence, None where its logits are not finite.

    Sequences that only need the likeliest token share one search.
    """
    best = logits_BV.max(-1)
    finite_B, best_B = best.values.isfinite().tolist(), best.indices.tolist()
    return [
        sampler.choose(logits_V, token) if finite else None
        for sampler, finite, token, logits_V in zip(samplers, finite_B, best_B, logits_BV, strict=True)
    ]
