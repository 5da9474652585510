"""The algorithm of ShortV's released code, as the baseline of `jobs/bench.py sweep`: one whole forward per layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shortv.families import Batch, Decoder, LoadedModel
from shortv.sweep.ablations import last_logits
from shortv.sweep.divergence import Divergence, divergence, log_probabilities


@torch.inference_mode()
def measure_released(loaded: LoadedModel, batch: Batch) -> list[Divergence]:
    """LC of visual tokens per layer from L + 1 forwards of the whole model, vision tower included.

    The numbers are the corrected ones (float64 softmax, masks instead of the image offset 35), so that only the
    amount of work differs from `measure`.
    """
    full_BV = log_probabilities(_forward(loaded, batch))
    values = []
    for layer in loaded.decoder.layers:
        with _silenced(loaded.decoder, layer, batch.types.visual_BT[:, :, None]):
            values.append(divergence(full_BV, log_probabilities(_forward(loaded, batch))))
    return values


def _forward(loaded: LoadedModel, batch: Batch) -> Tensor:
    left: list[Tensor] = []
    handle = loaded.decoder.layers[-1].register_forward_hook(lambda _, __, output: left.append(output))
    try:
        loaded.decoder.backbone(**batch.inputs, use_cache=False)
    finally:
        handle.remove()
    return last_logits(loaded.decoder, left[0], batch.types.last_B)


@contextmanager
def _silenced(decoder: Decoder, layer: nn.Module, visual_BT1: Tensor) -> Iterator[None]:
    """Zero both halves' outputs at visual positions before they are added to the residual stream."""

    def silence(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].masked_fill(visual_BT1, 0), *output[1:])
        return output.masked_fill(visual_BT1, 0)

    handles = [part.register_forward_hook(silence) for part in (decoder.attention(layer), decoder.ffn(layer))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
