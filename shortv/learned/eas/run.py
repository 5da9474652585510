"""How EAS's adapters run: folded into the FFN of layers that skip their attention, before the attention of the others.

Shapes: B batch, T positions of this forward, D width, M width of the FFN, R rank, C = 2 R + 2 columns of a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortv.errors import Refused
from shortv.families import Decoder
from shortv.layers.fast import PlannedLayer
from shortv.layers.progress import Progress
from shortv.learned.base import PartsRun
from shortv.learned.eas.parts import Adapter, Adapters, Pia, check_family
from shortv.plan import Mode


class Fold(NamedTuple):
    """A PIA's up-projections behind the FFN norm's weight g and an FFN input matrix W: W diag(g) s [B D B_bias D_bias].

    The routing of a sample weighs the columns, so one fold serves every prompt of every batch; W itself is not copied.
    """

    gate_MC: Tensor
    up_MC: Tensor


def fold(decoder: Decoder, layer: nn.Module, pia: Pia) -> Fold:
    """Fold a PIA into its layer's FFN, exactly; the released code passes the bias through the folded weight."""
    ffn: Any = decoder.ffn(layer)
    like = pia.first.weight
    up_DC = torch.cat(
        [pia.first.dense_DR, pia.second.dense_DR, pia.first.bias[:, None], pia.second.bias[:, None]], dim=1
    )
    scaled_DC = pia.scale * _norm_weight(decoder, layer).to(like)[:, None] * up_DC
    return Fold(gate_MC=ffn.gate_proj.weight.to(like) @ scaled_DC, up_MC=ffn.up_proj.weight.to(like) @ scaled_DC)


def prompt_mean(normed_BTD: Tensor, prompt_BT: Tensor) -> Tensor:
    """Return the mean of the prompt's rows (B, D), in float32."""
    prompt_BT1 = prompt_BT.to(normed_BTD.device, torch.float32)[:, :, None]
    return (normed_BTD.float() * prompt_BT1).sum(1) / prompt_BT1.sum(1).clamp(min=1)


class AdaptedRun(PartsRun[Adapters]):
    """A plan of skip-attention and full layers, each with its adapter."""

    reads_prompt = True

    def __init__(
        self, decoder: Decoder, modes: Sequence[Mode], parts: Adapters, threshold: float | None = None
    ) -> None:
        """Take one mode per layer. Raises Refused where modes and adapters disagree."""
        super().__init__(decoder, modes, parts, threshold)
        check_family(decoder)
        has = {Mode.FULL: parts.settings.kept, Mode.SKIP_ATTENTION: parts.settings.skipped}
        for layer, mode in enumerate(modes):
            if mode not in has:
                raise Refused(f"layer {layer} is {mode}; EAS parts run with layers that are full or skip-attention")
            if layer not in has[mode]:
                raise Refused(
                    f"layer {layer} is {mode}, but the EAS parts have no adapter for that; make the plan's "
                    f"skip-attention layers those of the parts: {list(parts.settings.skipped)}"
                )

    def executor(self, index: int) -> Callable[..., Tensor]:
        """Return the forward of a layer by its mode."""
        return self._skipped if self.modes[index] is Mode.SKIP_ATTENTION else self._kept

    def attach_reference(self, model: nn.Module, progress: Progress, hooks: ExitStack) -> None:
        """Run adapters unfolded: over the norm's output in kept layers, in place of the dense layer in skipped ones."""
        super().attach_reference(model, progress, hooks)

        def adapt(index: int, _: nn.Module, __: tuple[Any, ...], normed_BTD: Tensor) -> Tensor:
            return self._adapted(index, progress, normed_BTD)

        for index, layer in enumerate(self.decoder.layers):
            norm = self.decoder.attention_norm(layer)
            hooks.callback(norm.register_forward_hook(partial(adapt, index)).remove)

    def after(self, progress: Progress, index: int, entered_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Compute a skipped layer anew, as the FFN of what its adapter returns."""
        if self.modes[index] is not Mode.SKIP_ATTENTION:
            return output_BTD
        decoder, layer = self.decoder, self.decoder.layers[index]
        entered_BTD = entered_BTD.to(decoder.device(layer))
        adapted_BTD: Tensor = decoder.attention_norm(layer)(entered_BTD)
        output_BTD = decoder.ffn(layer)(_norm_weight(decoder, layer) * adapted_BTD)
        return entered_BTD + output_BTD

    def _adapted(self, index: int, sequence: Progress, normed_BTD: Tensor) -> Tensor:
        adapter = self._adapter(index)
        adapted_BTD: Tensor = adapter(normed_BTD, *_summary(adapter, index, sequence, normed_BTD))
        return adapted_BTD

    def _adapter(self, index: int) -> Adapter:
        modules = self.parts.skipped if self.modes[index] is Mode.SKIP_ATTENTION else self.parts.kept
        return cast(Adapter, modules[str(index)])

    def _kept(self, planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
        decoder, layer = planned.decoder, planned.layer
        adapted_BTD = self._adapted(planned.index, planned.progress, decoder.attention_norm(layer)(hidden))
        output_BTD, _ = decoder.attention(layer)(hidden_states=adapted_BTD, **arguments)
        return decoder.ffn_half(layer, decoder.add_attention(layer, hidden, output_BTD))

    def _skipped(self, planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
        decoder, layer, index = planned.decoder, planned.layer, planned.index
        planned.shorten_cache(hidden, arguments.get("past_key_values"))
        pia, ffn = cast(Pia, self._adapter(index)), cast(Any, decoder.ffn(layer))
        normed_BTD = decoder.attention_norm(layer)(hidden)
        weights_B2, context_BR = _summary(pia, index, planned.progress, normed_BTD)
        bottleneck_BTR = pia.bottleneck(normed_BTD, weights_B2, context_BR)
        weights_BT2 = weights_B2[:, None].expand(-1, hidden.shape[1], -1)
        routed_BTC = torch.cat(
            [weights_BT2[..., :1] * bottleneck_BTR, weights_BT2[..., 1:] * bottleneck_BTR, weights_BT2], dim=-1
        )
        folded, scaled_BTD = self._folded(index, layer, pia), normed_BTD * _norm_weight(decoder, layer)
        gate_BTM = ffn.gate_proj(scaled_BTD) + linear(routed_BTC, folded.gate_MC).to(hidden.dtype)
        up_BTM = ffn.up_proj(scaled_BTD) + linear(routed_BTC, folded.up_MC).to(hidden.dtype)
        output_BTD: Tensor = ffn.down_proj(ffn.act_fn(gate_BTM) * up_BTM)
        return hidden + output_BTD

    def _folded(self, index: int, layer: nn.Module, pia: Pia) -> Fold:
        """Return a layer's fold: computed once for trained parts, each time for parts in training."""
        if pia.first.weight.requires_grad:
            return fold(self.decoder, layer, pia)
        ffn = cast(Any, self.decoder.ffn(layer))
        own = (_norm_weight(self.decoder, layer), ffn.gate_proj.weight, ffn.up_proj.weight)
        weights = (*pia.parameters(), *own)
        state = tuple((value.data_ptr(), 0 if value.is_inference() else value._version) for value in weights)
        if self.parts.derived.get(index, (None,))[0] != state:
            # Outside inference mode, because the result serves callers with and without gradients.
            with torch.inference_mode(False), torch.no_grad():
                self.parts.derived[index] = state, fold(self.decoder, layer, pia)
        return cast(Fold, self.parts.derived[index][1])


def _summary(adapter: Adapter, index: int, sequence: Progress, normed_BTD: Tensor) -> tuple[Tensor, ...]:
    """Return what the samples' tokens share in a layer: computed from the prompt, and stored with the KV cache."""
    gathered = sequence.history.gathered
    if index not in gathered:
        gathered[index] = adapter.summary(prompt_mean(normed_BTD, sequence.prompt_BT))
    return gathered[index]


def _norm_weight(decoder: Decoder, layer: nn.Module) -> Tensor:
    return cast(Tensor, decoder.ffn_norm(layer).weight)
