"""When is an exit safe? The answer with and without visual tokens in the later layers, compared (dyvte.md, section 3).

Shapes: B batch, K answer positions (padded), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortv.families.supervised import IGNORED
from shortv.learned.dyvte.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScores:
    """What a model thinks of given answers."""

    choice_BK: Tensor
    """Its most likely token at each position."""
    nats_B: Tensor
    """Cross-entropy per token of each answer, in float32."""
    answer_BK: Tensor
    """Which positions are answer."""

    @classmethod
    def of(cls, logits_BKV: Tensor, labels_BK: Tensor) -> AnswerScores:
        """Score answers from the logits that predict them; positions with the label IGNORED are none."""
        answer_BK = labels_BK != IGNORED
        log_BKV = logits_BKV.float().log_softmax(-1)
        chosen_BK = log_BKV.gather(2, labels_BK.clamp(min=0)[:, :, None])[:, :, 0]
        nats_B = -torch.where(answer_BK, chosen_BK, 0).sum(1) / answer_BK.sum(1)
        return cls(choice_BK=logits_BKV.argmax(-1), nats_B=nats_B, answer_BK=answer_BK)


def is_safe(full: AnswerScores, left: AnswerScores, recipe: Recipe) -> Tensor:
    """Whether visual tokens may leave (B,): the answers agree, by the recipe's rule."""
    same_BK = (full.choice_BK == left.choice_BK) & full.answer_BK
    share_B = same_BK.sum(1) / full.answer_BK.sum(1)
    if recipe.rule == "exact":
        return share_B == 1
    bound_B = recipe.ce_ratio * full.nats_B + recipe.ce_slack
    # The code's "less than" would call an exit unsafe where nothing changed because both are exactly zero.
    return (share_B > recipe.agreement) & ((left.nats_B < bound_B) | (left.nats_B <= full.nats_B))
