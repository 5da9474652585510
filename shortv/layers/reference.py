"""The reference executor: run every layer densely and cancel what a mode leaves out. The truth, not the speed.

Shapes: B batch, T positions of this forward, K keys (cached positions and this forward's), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from shortv.families import decoder_of
from shortv.layers.progress import LearnedRun, Progress
from shortv.layers.rows import hide_keys
from shortv.plan import Mode, Tokens, works_of


@contextmanager
def reference(model: nn.Module, modes: Sequence[Mode], run: LearnedRun | None = None) -> Iterator[None]:
    """Run a transformers model with one mode per decoder layer, for `model(...)` and `model.generate(...)`.

    Visual tokens are found by the placeholder ids in `input_ids`; tokens after the prompt are text.

    Raises:
        Refused: the family is not supported, or the number of modes is not the number of layers.
        ShortVError: a forward without `input_ids`, or one that continues a sequence begun outside.
    """
    decoder = decoder_of(model)
    progress = Progress(decoder, modes, run)
    with ExitStack() as hooks:
        progress.attach(model, hooks)
        if run is not None:
            run.attach_reference(model, progress, hooks)
        else:
            for layer, work in zip(decoder.layers, works_of(modes), strict=True):
                if work.hides_keys:
                    hook = _hide_visual_keys(decoder.attention(layer), progress)
                    hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                for half, tokens in ((decoder.attention(layer), work.queries), (decoder.ffn(layer), work.ffn)):
                    if tokens is not Tokens.ALL:
                        hooks.callback(half.register_forward_hook(_silence(~tokens, progress)).remove)
        yield


def _silence(tokens: Tokens, progress: Progress) -> Callable[..., Any]:
    """Set what these tokens get out of a half to zero, before it is added to the residual stream."""

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        branch_BTD = output[0] if isinstance(output, tuple) else output
        silent_BT1 = progress.types.among(tokens)[:, :, None].to(branch_BTD.device)
        branch_BTD = branch_BTD.masked_fill(silent_BT1, 0)
        return (branch_BTD, *output[1:]) if isinstance(output, tuple) else branch_BTD

    return leave


def _hide_visual_keys(attention: nn.Module, progress: Progress) -> Callable[..., Any]:
    """Hide visual keys from every query; no mode hides text keys from a query."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        mask = progress.mask_of(attention, kwargs.get("attention_mask"), hidden_BTD.device)
        visual_BK = progress.visual_BK.to(hidden_BTD.device)[:, -mask.shape[3] :]
        return args, {**kwargs, "attention_mask": hide_keys(mask, visual_BK)}

    return enter
