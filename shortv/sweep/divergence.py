"""How far an ablated model's next-token distribution is from the full model's.

Half-precision softmax is what drowned the released code's smallest values in noise (about 1e-3 where the lowest layers
sit), so everything here is float64. Shapes: B samples, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """Per sample: both directions of the KL divergence in nats, and whether the most likely token changed."""

    kl_full_ablated_B: Tensor
    kl_ablated_full_B: Tensor
    top1_changed_B: Tensor


def log_probabilities(logits_BV: Tensor) -> Tensor:
    """Log-softmax in float64."""
    return logits_BV.double().log_softmax(-1)


def kl_divergence(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """KL(P || Q) in nats from log-probabilities, shape (B,); rounding below zero is cut off."""
    return (p_BV.exp() * (p_BV - q_BV)).sum(-1).clamp(min=0)


def divergence(full_BV: Tensor, ablated_BV: Tensor) -> Divergence:
    """Compare log-probabilities of the full and the ablated model (ShortV eq. 2; the paper's direction comes first)."""
    return Divergence(
        kl_full_ablated_B=kl_divergence(full_BV, ablated_BV),
        kl_ablated_full_B=kl_divergence(ablated_BV, full_BV),
        top1_changed_B=full_BV.argmax(-1) != ablated_BV.argmax(-1),
    )


def zero_where(inert_B: Tensor, values: Divergence) -> Divergence:
    """Exact zeros for samples that an ablation cannot change."""
    return Divergence(
        kl_full_ablated_B=values.kl_full_ablated_B.masked_fill(inert_B, 0.0),
        kl_ablated_full_B=values.kl_ablated_full_B.masked_fill(inert_B, 0.0),
        top1_changed_B=values.top1_changed_B & ~inert_B,
    )


def no_divergence(full_BV: Tensor) -> Divergence:
    """The divergence of an ablation that changes no sample of the batch."""
    zeros_B = torch.zeros_like(full_BV[:, 0])
    return Divergence(zeros_B, zeros_B, zeros_B.bool())
