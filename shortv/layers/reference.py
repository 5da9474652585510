"""The reference executor: run every layer densely, then put old rows back or mask them. The truth, not the speed.

Shapes: B batch, T positions of this forward, K keys (cached positions and this forward's), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shortv.errors import Refused
from shortv.families import Decoder, decoder_of
from shortv.families.parts.base import Learned
from shortv.families.tokens import TokenTypes, hide_keys
from shortv.layers.learned import LEARNED
from shortv.layers.sequence import SequenceState
from shortv.plan import Mode, validate_modes


@contextmanager
def reference(model: nn.Module, modes: Sequence[Mode], learned: Learned | None = None) -> Iterator[None]:
    """Run a transformers model with one mode per decoder layer, for `model(...)` and `model.generate(...)`.

    Visual tokens are told apart by the placeholder ids in `input_ids`; tokens that follow the prompt are text.

    Raises:
        Refused: the family is not supported, the number of modes is not the number of layers, or `drop-visual` is
            followed by another mode.
        ShortVError: a forward without `input_ids`, or one that continues a sequence begun outside.
    """
    decoder = decoder_of(model)
    validate_modes(modes)
    if len(modes) != len(decoder.layers):
        raise Refused(f"{len(modes)} modes for a model of {len(decoder.layers)} layers; give one mode per layer")
    sequence = SequenceState(decoder, modes, learned)
    with ExitStack() as hooks:
        for handle in sequence.attach(model):
            _attach(hooks, handle)
        if learned is not None:
            LEARNED[learned.parts.kind](decoder, modes, learned).attach_reference(model, sequence, hooks)
        else:
            for layer, mode in zip(decoder.layers, modes, strict=True):
                REFERENCE[mode](hooks, decoder, layer, sequence)
        yield


def _attach(hooks: ExitStack, handle: RemovableHandle) -> None:
    hooks.callback(handle.remove)


_Rows = Callable[[TokenTypes], Tensor]


def _keep_rows(rows: _Rows) -> Callable[[ExitStack, Decoder, nn.Module, SequenceState], None]:
    """Put the rows that entered the layer back over the rows that leave it."""

    def attach(hooks: ExitStack, _: Decoder, layer: nn.Module, sequence: SequenceState) -> None:
        entered: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[:] = [args[0] if args else kwargs["hidden_states"]]

        def leave(_: nn.Module, __: tuple[Any, ...], output_BTD: Tensor) -> Tensor:
            kept_BT1 = rows(sequence.types)[:, :, None].to(output_BTD.device)
            return torch.where(kept_BT1, entered.pop().to(output_BTD.device), output_BTD)

        _attach(hooks, layer.register_forward_pre_hook(enter, with_kwargs=True))
        _attach(hooks, layer.register_forward_hook(leave))

    return attach


def _silence(part: Callable[[Decoder, nn.Module], nn.Module], rows: _Rows) -> Callable[..., None]:
    """Set some rows of a half's output to zero before it is added to the residual stream."""

    def attach(hooks: ExitStack, decoder: Decoder, layer: nn.Module, sequence: SequenceState) -> None:
        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            branch_BTD = output[0] if isinstance(output, tuple) else output
            silent_BT1 = rows(sequence.types)[:, :, None].to(branch_BTD.device)
            branch_BTD = branch_BTD.masked_fill(silent_BT1, 0)
            return (branch_BTD, *output[1:]) if isinstance(output, tuple) else branch_BTD

        _attach(hooks, part(decoder, layer).register_forward_hook(leave))

    return attach


def _hide_visual_keys(hooks: ExitStack, decoder: Decoder, layer: nn.Module, sequence: SequenceState) -> None:
    """Nobody attends to visual tokens in this layer; with all later layers doing the same they are gone."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        mask = sequence.mask_of(decoder.attention(layer), kwargs.get("attention_mask"), hidden_BTD.device)
        visual_BK = sequence.visual_BK.to(hidden_BTD.device)[:, -mask.shape[3] :]
        return args, {**kwargs, "attention_mask": hide_keys(mask, visual_BK)}

    _attach(hooks, layer.register_forward_pre_hook(enter, with_kwargs=True))


def _nothing(*_: Any) -> None:
    """The full layer."""


REFERENCE: dict[Mode, Callable[[ExitStack, Decoder, nn.Module, SequenceState], None]] = {
    Mode.FULL: _nothing,
    Mode.FREEZE_VISUAL: _keep_rows(lambda types: types.visual_BT),
    Mode.FREEZE_TEXT: _keep_rows(lambda types: types.text_BT),
    Mode.NO_VISUAL_QUERIES: _silence(Decoder.attention, lambda types: types.visual_BT),
    Mode.NO_VISUAL_FFN: _silence(Decoder.ffn, lambda types: types.visual_BT),
    Mode.SKIP_ATTENTION: _silence(Decoder.attention, lambda types: torch.ones_like(types.visual_BT)),
    Mode.DROP_VISUAL: _hide_visual_keys,
}
