"""Layer Contribution of every layer of one batch, from one clean pass and the ablations that continue from it.

That is half of the L(L+1) layer passes of one full forward per layer (ShortV, section 3.1). Half-precision softmax is
what drowned the released code's smallest values in noise (about 1e-3 where the lowest layers sit), so distributions are
compared in float64. Shapes: B samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from shortv.families import Batch, LoadedModel
from shortv.families.tokens import TokenTypes
from shortv.plan import VISUAL_MODES, Mode
from shortv.records import LcRecord
from shortv.sweep.ablations import Ablation, ablate, allocation_failures, run_clean

NOISE_PADDING = 8
"""Padding tokens that a batch of one sample gets for the noise floor."""


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


@dataclass(slots=True, kw_only=True)
class BatchLC:
    """Divergences of one batch per ablation."""

    full_BV: Tensor
    """Log-probabilities of the full model, float64."""
    values: dict[Ablation, Divergence] = field(default_factory=dict)
    finite_B: Tensor
    """Samples whose logits were finite in the full model and in every ablation."""

    def records(self, sample_ids: Sequence[str]) -> list[LcRecord]:
        """One row per finite sample x mode x layer."""
        columns = {ablation: [column.tolist() for column in value] for ablation, value in self.values.items()}
        return [
            LcRecord(
                sample_id=sample_id,
                mode=mode,
                layer=layer,
                kl_full_ablated=full_ablated[index],
                kl_ablated_full=ablated_full[index],
                top1_changed=changed[index],
            )
            for index, sample_id in enumerate(sample_ids)
            if self.finite_B[index]
            for (layer, mode), (full_ablated, ablated_full, changed) in columns.items()
        ]


@torch.inference_mode()
def measure(
    loaded: LoadedModel, batch: Batch, *, layers: range, modes: Sequence[Mode], stack: int | None = None
) -> BatchLC:
    """Measure LC(mode, layer) of each sample of a batch for some layers.

    Args:
        layers: which layers to ablate, one at a time, within 0..L-1.
        stack: ablations run together; by default what fits a fixed share of the device's memory. Running out of
            memory halves it.

    Raises:
        torch.OutOfMemoryError: a single ablation of this batch does not fit.
    """
    with allocation_failures():
        clean = run_clean(loaded.decoder, batch, modes)
    full_BV = log_probabilities(clean.logits_BV)
    result = BatchLC(full_BV=full_BV, finite_B=clean.logits_BV.isfinite().all(-1))
    inert_B = ~batch.types.visual_BT.any(1).to(full_BV.device)
    idle = VISUAL_MODES.intersection(modes) if inert_B.all() else frozenset()
    unchanged = divergence(full_BV, full_BV).zero_where(inert_B)
    result.values |= {Ablation(layer, mode): unchanged for mode in idle for layer in layers}
    working = [mode for mode in modes if mode not in idle]
    for ablation, logits_BV in ablate(loaded, batch, clean, layers, working, stack=stack):
        logits_BV = logits_BV.to(full_BV.device)
        value = divergence(full_BV, log_probabilities(logits_BV))
        result.values[ablation] = value.zero_where(inert_B) if ablation.mode in VISUAL_MODES else value
        result.finite_B &= logits_BV.isfinite().all(-1)
    return result


@torch.inference_mode()
def noise_floor(loaded: LoadedModel, alone: Sequence[Batch], batch: Batch, full_BV: Tensor | None = None) -> float:
    """Largest KL divergence in nats between a sample's clean pass alone and in its batch, over samples and directions.

    A batch of one sample is compared with itself under a few padding tokens.

    Args:
        alone: each sample of the batch as a batch of its own, on the model's device.
        full_BV: log-probabilities of the batch's clean pass, where it has been run.
    """

    def clean(one: Batch) -> Tensor:
        return log_probabilities(run_clean(loaded.decoder, one).logits_BV)

    if len(alone) == 1:
        batch, full_BV = _padded(batch, loaded.processor.tokenizer.pad_token_id or 0), None
    full_BV = clean(batch) if full_BV is None else full_BV
    alone_BV = torch.cat([clean(one) for one in alone]).to(full_BV.device)
    return float(torch.maximum(kl_divergence(alone_BV, full_BV), kl_divergence(full_BV, alone_BV)).max())


def _padded(batch: Batch, pad_id: int) -> Batch:
    """The batch with `NOISE_PADDING` padding tokens before each prompt."""
    types = batch.types
    wider = {
        name: pad(value, (NOISE_PADDING, 0), value=pad_id if name == "input_ids" else 0)
        for name, value in batch.inputs.items()
        if value.shape == types.text_BT.shape
    }
    visual_BT, text_BT = (pad(mask_BT, (NOISE_PADDING, 0)) for mask_BT in (types.visual_BT, types.text_BT))
    return Batch(inputs={**batch.inputs, **wider}, types=TokenTypes(visual_BT=visual_BT, text_BT=text_BT))
