"""How far an ablated model's next-token distribution is from the full model's.

Half-precision softmax is what drowned the released code's smallest values in noise (about 1e-3 where the lowest layers
sit), so everything here is float64. Shapes: B samples, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import kl_div


class Divergence(NamedTuple):
    """Per sample: both directions of the KL divergence in nats, and whether the most likely token changed."""

    kl_full_ablated_B: Tensor
    kl_ablated_full_B: Tensor
    top1_changed_B: Tensor

    def zero_where(self, inert_B: Tensor) -> Divergence:
        """Return exact zeros for samples that an ablation cannot change."""
        return Divergence(*(values_B.masked_fill(inert_B, 0) for values_B in self))


def log_probabilities(logits_BV: Tensor) -> Tensor:
    """Return the log-softmax in float64."""
    return logits_BV.double().log_softmax(-1)


def kl_divergence(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """Return KL(P || Q) in nats from log-probabilities, shape (B,); rounding below zero is cut off."""
    return kl_div(q_BV, p_BV, reduction="none", log_target=True).sum(-1).clamp(min=0)


def divergence(full_BV: Tensor, ablated_BV: Tensor) -> Divergence:
    """Compare log-probabilities of the full and the ablated model (ShortV eq. 2; the paper's direction comes first)."""
    return Divergence(
        kl_full_ablated_B=kl_divergence(full_BV, ablated_BV),
        kl_ablated_full_B=kl_divergence(ablated_BV, full_BV),
        top1_changed_B=full_BV.argmax(-1) != ablated_BV.argmax(-1),
    )
