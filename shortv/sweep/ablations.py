"""One clean pass of the full model, and ablated forwards that continue from its states.

An ablation changes one layer, so up to that layer its states are the clean pass's. What leaves the ablated layer is a
selection of the clean pass's rows, plus one FFN pass where tokens that do not attend pass the FFN, or one pass over
the text alone where queries lose keys. The following layers run stacked along the batch axis: each layer's weights
are read once for all ablations under way. Shapes: B batch, T positions, S text positions, N stacked sequences,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortv.costs import STACK_SHARE, activation_bytes
from shortv.families import Batch, Decoder, LoadedModel
from shortv.families.tokens import TokenTypes, last_true
from shortv.layers.rows import Selection, explicit_mask
from shortv.plan import WORK, Mode, Tokens

CPU_BUDGET = 256 * 2**20
"""Bytes that stacked ablations may fill on a CPU; on a GPU it is `costs.STACK_SHARE` of its memory."""


class Ablation(NamedTuple):
    """One mode in one layer (for `drop-visual`: in that layer and all later ones)."""

    layer: int
    mode: Mode


@dataclass(slots=True, kw_only=True)
class CleanPass:
    """What the full model computed, per layer; `BTD` states of the residual stream."""

    entering: list[Tensor] = field(default_factory=list)
    """Residual stream entering each layer."""
    middle: list[Tensor] = field(default_factory=list)
    """Between a layer's attention and FFN halves; empty unless a mode needs it."""
    leaving: list[Tensor] = field(default_factory=list)
    """Residual stream leaving each layer."""
    between: list[Tensor | None] = field(default_factory=list)
    """What the model adds to the residual stream after each layer (Qwen3-VL's DeepStack), None for nothing."""
    arguments: list[dict[str, Any]] = field(default_factory=list)
    """Keyword arguments (mask, positions, ...) the model passed to each layer."""
    logits_BV: Tensor
    """Next-token logits at each sample's last position."""


def run_clean(decoder: Decoder, batch: Batch, modes: Sequence[Mode] = ()) -> CleanPass:
    """Run the full model on a batch and keep the states that ablations with these modes start from."""
    clean = CleanPass(logits_BV=torch.empty(0))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        clean.entering.append(args[0] if args else arguments.pop("hidden_states"))
        clean.arguments.append(arguments)

    def leave(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        clean.leaving.append(output)

    def halfway(_: nn.Module, args: tuple[Any, ...]) -> None:
        clean.middle.append(args[0])

    def deepstack(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for features_ND in kwargs.get("deepstack_visual_embeds") or ():
            added_BTD = kwargs["inputs_embeds"].new_zeros(kwargs["inputs_embeds"].shape)
            added_BTD[batch.types.visual_BT] = features_ND.to(added_BTD)
            clean.between.append(added_BTD)

    with ExitStack() as hooks:
        for layer in decoder.layers:
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
            if any(WORK[mode].queries & ~WORK[mode].ffn for mode in modes):
                hooks.callback(decoder.ffn_norm(layer).register_forward_pre_hook(halfway).remove)
        hooks.callback(decoder.text.register_forward_pre_hook(deepstack, with_kwargs=True).remove)
        decoder.backbone(**batch.inputs, use_cache=False)
    clean.between += [None] * (len(decoder.layers) - len(clean.between))
    clean.logits_BV = last_logits(decoder, clean.leaving[-1], batch.types.last_B)
    return clean


def last_logits(decoder: Decoder, hidden_BTD: Tensor, last_B: Tensor) -> Tensor:
    """Return the logits at one position per sample.

    Always called with the B rows of one ablation, never with a stack: the same rows through the same shapes give the
    same bits, so an ablation that changes nothing has a divergence of exactly zero.
    """
    rows_B = torch.arange(len(last_B), device=hidden_BTD.device)
    return decoder.logits(hidden_BTD[rows_B, last_B.to(hidden_BTD.device)])


def ablate(
    loaded: LoadedModel,
    batch: Batch,
    clean: CleanPass,
    layers: range,
    modes: Sequence[Mode],
    *,
    stack: int | None = None,
) -> Iterator[tuple[Ablation, Tensor]]:
    """Yield each ablation with its logits (B, V).

    Args:
        stack: ablations that run together; by default what `automatic_stack` says. Running out of memory halves it.

    Raises:
        torch.OutOfMemoryError: a single ablation of this batch does not fit.
    """
    text = _TextStates(clean, batch.types)
    dense = _DenseStates(loaded.decoder, clean, batch.types, text)
    ablations = [Ablation(layer, mode) for layer in layers for mode in modes]
    for states, dropped in ((dense, False), (text, True)):
        group = [ablation for ablation in ablations if (ablation.mode is Mode.DROP_VISUAL) is dropped]
        yield from _in_stacks(loaded, states, group, stack)


class _TextStates:
    """States of `drop-visual`: text tokens alone, at their original positions, from the ablated layer on."""

    def __init__(self, clean: CleanPass, types: TokenTypes) -> None:
        self._clean, self.text = clean, Selection.of(types.text_BT)
        self._squares: dict[int, Tensor] = {}
        self.last_B = last_true(self.text.valid_BS)
        self.length = self.text.valid_BS.shape[1]

    def first(self, ablation: Ablation) -> int:
        """The first layer that the ablation still has to run: the ablated one."""
        return ablation.layer

    def start(self, ablation: Ablation) -> Tensor:
        """The state with which the ablation enters that layer, (B, S, D)."""
        return self.text.rows(self._clean.entering[ablation.layer])

    def arguments(self, layer: int) -> dict[str, Any]:
        """Keyword arguments of a layer for one unstacked batch."""
        arguments = dict(self._clean.arguments[layer])
        mask, (cos, sin) = arguments.get("attention_mask"), arguments["position_embeddings"]
        batch, length = self._clean.entering[layer].shape[:2]
        device = self._clean.entering[layer].device
        # Layers of one kind share one mask object, so its text rows are selected once.
        if id(mask) not in self._squares:
            full = explicit_mask(mask, batch=batch, queries=length, keys=length, device=device)
            self._squares[id(mask)] = self.text.square(full)
        arguments["attention_mask"] = self._squares[id(mask)].to(device)
        arguments["position_embeddings"] = (self.text.rows(cos), self.text.rows(sin))
        if isinstance(arguments.get("position_ids"), Tensor):
            arguments["position_ids"] = self.text.rows(arguments["position_ids"])
        return arguments

    def after(self, layer: int) -> Tensor | None:
        """What the model adds to the states of one unstacked batch after a layer: only visual rows, which are gone."""
        return None


class _DenseStates:
    """The same for ablations that carry every position, from the layer after the ablated one on."""

    def __init__(self, decoder: Decoder, clean: CleanPass, types: TokenTypes, text: _TextStates) -> None:
        self._decoder, self._clean, self._types, self._text = decoder, clean, types, text
        self.last_B = types.last_B
        self.length = types.text_BT.shape[1]

    def first(self, ablation: Ablation) -> int:
        return ablation.layer + 1

    def start(self, ablation: Ablation) -> Tensor:
        state_BTD, added_BTD = self._leaving(ablation), self.after(ablation.layer)
        return state_BTD if added_BTD is None else state_BTD + added_BTD

    def arguments(self, layer: int) -> dict[str, Any]:
        return self._clean.arguments[layer]

    def after(self, layer: int) -> Tensor | None:
        return self._clean.between[layer]

    def _leaving(self, ablation: Ablation) -> Tensor:
        """What leaves the ablated layer."""
        index, work = ablation.layer, WORK[ablation.mode]
        layer, leaving_BTD = self._decoder.layers[index], self._clean.leaving[index]
        entering_BTD = self._clean.entering[index].to(leaving_BTD.device)
        if work.hides_keys:
            updated_BSD = layer(self._text.start(ablation), **self._text.arguments(index))
            state_BTD, device = entering_BTD.clone(), leaving_BTD.device
            state_BTD[self._types.text_BT.to(device)] = updated_BSD[self._text.text.valid_BS.to(device)]
            return state_BTD
        ffn_alone_BTD = self._decoder.ffn_half(layer, entering_BTD) if work.ffn & ~work.queries else entering_BTD

        def state(token: Tokens) -> Tensor:
            if token in work.queries:
                return leaving_BTD if token in work.ffn else self._clean.middle[index]
            return ffn_alone_BTD if token in work.ffn else entering_BTD

        visual_BT1 = self._types.visual_BT[:, :, None].to(leaving_BTD.device)
        return torch.where(visual_BT1, state(Tokens.VISUAL), state(Tokens.TEXT))


def _in_stacks(
    loaded: LoadedModel, states: _DenseStates | _TextStates, ablations: list[Ablation], stack: int | None
) -> Iterator[tuple[Ablation, Tensor]]:
    size = stack or automatic_stack(loaded, len(states.last_B), states.length)
    while ablations:
        group = ablations[:size]
        try:
            with allocation_failures():
                logits = _run_stack(loaded.decoder, states, group)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            size = len(group) // 2
            continue
        yield from zip(group, logits, strict=True)
        ablations = ablations[len(group) :]


def _run_stack(decoder: Decoder, states: _DenseStates | _TextStates, stack: Sequence[Ablation]) -> list[Tensor]:
    """Return logits (B, V) of each ablation; an ablation joins at the first layer that it has to run."""
    batch = len(states.last_B)
    order = sorted(range(len(stack)), key=lambda number: states.first(stack[number]))
    waiting = [stack[number] for number in order]
    running: list[Tensor] = []
    for index in range(states.first(waiting[0]), len(decoder.layers) + 1):
        while waiting and states.first(waiting[0]) == index:
            running.append(states.start(waiting.pop(0)))
        if index == len(decoder.layers):
            break
        hidden_NTD = running[0] if len(running) == 1 else torch.cat([state.to(running[0].device) for state in running])
        stacked = len(hidden_NTD) // batch
        hidden_NTD = decoder.layers[index](hidden_NTD, **_repeat(states.arguments(index), stacked, batch))
        added_BTD = states.after(index)
        running = [hidden_NTD if added_BTD is None else hidden_NTD + _repeat(added_BTD, stacked, batch)]
    finished = [state_BTD for state in running for state_BTD in torch.split(state, batch)]
    logits: list[Tensor] = [torch.empty(0)] * len(stack)
    for number, state_BTD in zip(order, finished, strict=True):
        logits[number] = last_logits(decoder, state_BTD, states.last_B)
    return logits


def _repeat(value: Any, times: int, batch: int) -> Any:
    """Repeat everything that has one entry per sample; what is shared by the batch stays and broadcasts."""
    if isinstance(value, dict):
        return {name: _repeat(item, times, batch) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeat(item, times, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch and batch > 1 and times > 1:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


def automatic_stack(loaded: LoadedModel, batch: int, length: int) -> int:
    """Return how many ablations fit the memory set aside for them.

    It is a fixed share of the device, not of what happens to be free: the same command stacks the same way every time.
    """
    architecture, itemsize = loaded.architecture, int(loaded.model.dtype.itemsize)
    needed = activation_bytes(architecture, batch * length, itemsize)
    if loaded.model.config._attn_implementation == "eager":
        needed += batch * length * length * architecture.num_heads * (itemsize + 4)
    budget = CPU_BUDGET
    if loaded.device.type == "cuda":
        budget = int(STACK_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    return max(1, budget // needed)


@contextmanager
def allocation_failures() -> Iterator[None]:
    """Give a failed CPU allocation, a plain RuntimeError in torch, the type that a GPU's has."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "allocate" in str(error) and "memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
