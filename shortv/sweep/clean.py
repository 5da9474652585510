"""The clean pass: the model's own forward, once, with the states and arguments of every layer kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shortv.families import Batch, Decoder


@dataclass(slots=True, kw_only=True)
class CleanPass:
    """What the full model computed, per layer; `BTD` states of the residual stream."""

    entering: list[Tensor] = field(default_factory=list)
    """Residual stream entering each layer."""
    middle: list[Tensor] = field(default_factory=list)
    """Between a layer's attention and FFN halves; empty unless asked for."""
    leaving: list[Tensor] = field(default_factory=list)
    """Residual stream leaving each layer."""
    between: list[Tensor | None] = field(default_factory=list)
    """What the model adds to the residual stream after each layer (Qwen3-VL's DeepStack), None for nothing."""
    arguments: list[dict[str, Any]] = field(default_factory=list)
    """Keyword arguments (mask, positions, ...) the model passed to each layer."""
    logits_BV: Tensor
    """Next-token logits at each sample's last position."""


def run_clean(decoder: Decoder, batch: Batch, *, keep_middle: bool) -> CleanPass:
    """Run the full model on a batch and keep what ablations start from."""
    clean = CleanPass(logits_BV=torch.empty(0))
    with ExitStack() as hooks:
        for layer in decoder.layers:
            hooks.enter_context(_hooked(layer.register_forward_pre_hook(_enter(clean), with_kwargs=True)))
            hooks.enter_context(_hooked(layer.register_forward_hook(_leave(clean))))
            if keep_middle:
                norm = decoder.ffn_norm(layer)
                hooks.enter_context(_hooked(norm.register_forward_pre_hook(_middle(clean))))
        hooks.enter_context(
            _hooked(decoder.text.register_forward_pre_hook(_deepstack(clean, batch.types.visual_BT), with_kwargs=True))
        )
        decoder.backbone(**batch.inputs, use_cache=False)
    clean.between += [None] * (len(decoder.layers) - len(clean.between))
    clean.logits_BV = last_logits(decoder, clean.leaving[-1], batch.types.last_B)
    return clean


def last_logits(decoder: Decoder, hidden_BTD: Tensor, last_B: Tensor) -> Tensor:
    """Logits at one position per sample.

    Always called with the B rows of one ablation, never with a stack: the same rows through the same shapes give the
    same bits, so an ablation that changes nothing has a divergence of exactly zero.
    """
    rows_B = torch.arange(len(last_B), device=hidden_BTD.device)
    return decoder.logits(hidden_BTD[rows_B, last_B.to(hidden_BTD.device)])


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _enter(clean: CleanPass) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        clean.entering.append(args[0] if args else arguments.pop("hidden_states"))
        clean.arguments.append(arguments)

    return hook


def _middle(clean: CleanPass) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        clean.middle.append(args[0])

    return hook


def _deepstack(clean: CleanPass, visual_BT: Tensor) -> Callable[..., None]:
    """Keep the features that the model adds to visual rows, spread over all rows."""

    def hook(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for features_ND in kwargs.get("deepstack_visual_embeds") or ():
            added_BTD = kwargs["inputs_embeds"].new_zeros(kwargs["inputs_embeds"].shape)
            added_BTD[visual_BT] = features_ND.to(added_BTD)
            clean.between.append(added_BTD)

    return hook


def _leave(clean: CleanPass) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        clean.leaving.append(output)

    return hook
