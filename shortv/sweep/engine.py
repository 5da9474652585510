"""Layer Contribution of every layer of one batch: the clean pass once, then each ablation from the layer it changes.

An ablated model equals the full model up to its layer, so an ablation starts from the kept states of the clean pass:
half of the L(L+1) layer passes of one full forward per layer (ShortV, section 3.1). The ablated layer itself is a
selection of rows from kept states, plus one FFN pass for the modes that skip attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shortv.families import Batch, LoadedModel
from shortv.plan import VISUAL_MODES, Mode
from shortv.records import LcRecord
from shortv.sweep.clean import CleanPass, run_clean
from shortv.sweep.divergence import (
    Divergence,
    divergence,
    kl_divergence,
    log_probabilities,
    no_divergence,
    zero_where,
)
from shortv.sweep.lanes import Ablation, DenseLane, Lane, TextLane
from shortv.sweep.passes import PassCounter
from shortv.sweep.stacking import allocation_failures, automatic_stack, run_stack

NOISE_PADDING = 8
"""Padding tokens that a batch of one sample gets for the noise floor."""


@dataclass(slots=True, kw_only=True)
class BatchLC:
    """Divergences of one batch per ablation, and what they cost."""

    full_BV: Tensor
    """Log-probabilities of the full model, float64."""
    values: dict[Ablation, Divergence] = field(default_factory=dict)
    finite_B: Tensor
    """Samples whose logits were finite in the full model and in every ablation."""
    passes: PassCounter = field(default_factory=PassCounter)

    @property
    def non_finite(self) -> tuple[int, ...]:
        """Indices of samples with a NaN or infinite logit somewhere."""
        return tuple(index for index, finite in enumerate(self.finite_B.tolist()) if not finite)

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
    decoder = loaded.decoder
    with allocation_failures():
        clean = run_clean(decoder, batch, keep_middle=Mode.NO_VISUAL_FFN in modes)
    full_BV = log_probabilities(clean.logits_BV)
    result = BatchLC(full_BV=full_BV, finite_B=clean.logits_BV.isfinite().all(-1))
    result.passes.clean += len(decoder.layers)
    inert_B = ~batch.types.visual_BT.any(1).to(full_BV.device)
    idle = VISUAL_MODES if inert_B.all() else frozenset()
    for mode in idle.intersection(modes):
        result.values |= {Ablation(layer, mode): no_divergence(full_BV) for layer in layers}
    working = [mode for mode in modes if mode not in idle]
    for ablation, logits_BV in ablate(loaded, batch, clean, layers, working, stack=stack, passes=result.passes):
        logits_BV = logits_BV.to(full_BV.device)
        value = divergence(full_BV, log_probabilities(logits_BV))
        result.values[ablation] = zero_where(inert_B, value) if ablation.mode in VISUAL_MODES else value
        result.finite_B &= logits_BV.isfinite().all(-1)
    return result


def ablate(
    loaded: LoadedModel,
    batch: Batch,
    clean: CleanPass,
    layers: range,
    modes: Sequence[Mode],
    *,
    stack: int | None,
    passes: PassCounter,
) -> Iterator[tuple[Ablation, Tensor]]:
    """Yield each ablation with its logits (B, V), continuing from a clean pass; counts the work in `passes`."""
    dense = [Ablation(layer, mode) for layer in layers for mode in modes if mode is not Mode.DROP_VISUAL]
    text = [Ablation(layer, Mode.DROP_VISUAL) for layer in layers if Mode.DROP_VISUAL in modes]
    if dense:
        yield from _stacks(loaded, DenseLane(loaded.decoder, clean, batch, passes), dense, stack, passes)
    if text:
        yield from _stacks(loaded, TextLane(clean, batch), text, stack, passes)


@torch.inference_mode()
def noise_floor(loaded: LoadedModel, alone: Sequence[Batch], batch: Batch, full_BV: Tensor | None = None) -> float:
    """Largest KL divergence in nats between a sample's clean pass alone and in its batch, over samples and directions.

    A batch of one sample is compared with itself under a few padding tokens.

    Args:
        alone: each sample of the batch as a batch of its own, on the model's device.
        full_BV: log-probabilities of the batch's clean pass, where it has been run.
    """

    def clean(one: Batch) -> Tensor:
        return log_probabilities(run_clean(loaded.decoder, one, keep_middle=False).logits_BV)

    if len(alone) == 1:
        batch, full_BV = _padded(batch, loaded.processor.tokenizer.pad_token_id), None
    full_BV = clean(batch) if full_BV is None else full_BV
    alone_BV = torch.cat([clean(one) for one in alone]).to(full_BV.device)
    return float(torch.maximum(kl_divergence(alone_BV, full_BV), kl_divergence(full_BV, alone_BV)).max())


def _stacks(
    loaded: LoadedModel, lane: Lane, ablations: list[Ablation], stack: int | None, passes: PassCounter
) -> Iterator[tuple[Ablation, Tensor]]:
    size = stack or automatic_stack(loaded, len(lane.last_B), lane.length)
    while ablations:
        group = ablations[:size]
        try:
            with allocation_failures():
                logits = run_stack(loaded.decoder, lane, group, passes)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            size = len(group) // 2
            continue
        yield from zip(group, logits, strict=True)
        ablations = ablations[len(group) :]


def _padded(batch: Batch, pad_id: int) -> Batch:
    types = batch.types
    fill = {"input_ids": pad_id or 0}
    per_token = {name for name, value in batch.inputs.items() if value.shape == types.text_BT.shape}
    inputs = {
        name: torch.nn.functional.pad(value, (NOISE_PADDING, 0), value=fill.get(name, 0))
        if name in per_token
        else value
        for name, value in batch.inputs.items()
    }
    pad = torch.nn.functional.pad
    visual_BT, text_BT = pad(types.visual_BT, (NOISE_PADDING, 0)), pad(types.text_BT, (NOISE_PADDING, 0))
    return Batch(inputs=inputs, types=type(types)(visual_BT=visual_BT, text_BT=text_BT))
