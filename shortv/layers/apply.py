"""`with shortv.apply(model, plan):` - a transformers model follows a plan inside and is untouched outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families import Decoder, decoder_of
from shortv.families.loading import ATTENTION_IMPLEMENTATIONS
from shortv.families.parts import Learned, held_parts
from shortv.layers.fast import PlannedLayer
from shortv.layers.learned import run_of
from shortv.layers.progress import Progress
from shortv.plan import Mode, Plan, Work, parse_mode, works_of

_MARK = "_shortv_applied"


@contextmanager
def apply(model: Any, plan: Plan | str | os.PathLike[str]) -> Iterator[list[str]]:
    """Run a transformers model under a plan: `model(...)`, `model.generate(...)` and everything built on them.

    No weights are copied; leaving the context, also by an exception, gives the model back bit for bit. Learned parts
    are read once and stay with the model, two plans' at most.

    EAS and DyVTE judge a prompt by the first forward of its KV cache: prefill it at once, because tokens that come
    later (chunks, turns, answers) give no information and let no visual token leave. Without a cache they cannot tell
    prompt from answer, and refuse a sequence that grows token by token.

    Args:
        plan: a Plan, a plan file, a folder with `shortv_plan.json`, or the name of a published plan.

    Yields:
        Warnings, one line each: another checkpoint or revision than the plan was made for.

    Raises:
        Refused: the plan does not fit the model, the model is in training mode or already under a plan, or its
            attention implementation has no mask whose rows can be selected; or learned parts that the plan names are
            not there or not for this model.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    architecture = Architecture.from_config_dict(model.config.to_dict())
    warnings = plan.check_fits(
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        model=getattr(model.config, "_name_or_path", "") or "this model",
        revision=getattr(model.config, "_commit_hash", None),
    )
    decoder, learned = decoder_of(model), None
    if plan.parts is not None:
        parts = held_parts(plan.parts, decoder, architecture)
        learned = Learned(parts=parts, threshold=plan.parts.threshold)
    with executing(model, plan.modes, learned):
        yield warnings


@contextmanager
def executing(model: Any, modes: Sequence[Mode], learned: Learned | None = None) -> Iterator[None]:
    """The same for bare modes, one per layer, and learned parts that are loaded already."""
    decoder = decoder_of(model)
    modes = tuple(parse_mode(mode) for mode in modes)
    _check(model, decoder, modes)
    with ExitStack() as undo:
        _claim(decoder, undo)
        if learned is not None or set(modes) != {Mode.FULL}:
            _follow(model, decoder, modes, learned, undo)
        yield


def _follow(model: Any, decoder: Decoder, modes: Sequence[Mode], learned: Learned | None, undo: ExitStack) -> None:
    run = run_of(decoder, modes, learned)
    progress = Progress(decoder, model.config, modes, learned)
    for handle in progress.attach(model):
        undo.callback(handle.remove)
    run.attach(model, progress, undo)
    works = works_of(modes)
    for index in range(len(modes)):
        executor = run.executor(index)
        if executor is not None:
            _patch(decoder, index, works, executor, progress, undo)


def _check(model: Any, decoder: Decoder, modes: Sequence[Mode]) -> None:
    if len(modes) != len(decoder.layers):
        raise Refused(f"{len(modes)} modes for a model of {len(decoder.layers)} layers; give one mode per layer")
    if model.training:
        raise Refused("the model is in training mode, where a plan would be silently wrong; call model.eval() first")
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTION_IMPLEMENTATIONS:
        raise Refused(
            f"attention implementation {attention!r} gives layers no mask whose rows can be selected; "
            f"load the model with one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


def _claim(decoder: Decoder, undo: ExitStack) -> None:
    token = object()
    # setdefault is atomic: of two threads, one finds the other's token. The decoder carries it, whatever wraps that.
    if decoder.text.__dict__.setdefault(_MARK, token) is not token:
        raise Refused("this model is already under a plan; leave that context first (plans do not nest or overlap)")
    undo.callback(decoder.text.__dict__.pop, _MARK)


def _patch(
    decoder: Decoder,
    index: int,
    works: Sequence[Work],
    executor: Callable[..., Tensor],
    progress: Progress,
    undo: ExitStack,
) -> None:
    layer = decoder.layers[index]
    # accelerate puts a forward that moves tensors between devices around the layer's own.
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    # After these layers the model itself reaches into the visual rows.
    alone = index < decoder.num_deepstack
    planned = PlannedLayer(
        decoder=decoder,
        layer=layer,
        index=index,
        work=works[index],
        own=getattr(layer, name),
        progress=progress,
        first=alone or index == decoder.num_deepstack or works[index - 1] != works[index],
        last=alone or index == len(works) - 1 or works[index + 1] != works[index],
    )
    ours = partial(executor, planned)
    setattr(layer, name, ours)
    undo.callback(_restore, layer, ours)


def _restore(layer: Any, ours: partial[Any]) -> None:
    """Take our forward out wherever it is by now: accelerate's hooks may have come or gone in between."""
    own = ours.args[0].own
    for name in ("forward", "_old_forward"):
        if layer.__dict__.get(name) is not ours:
            continue
        if name == "forward" and getattr(own, "__func__", None) is type(layer).forward:
            del layer.forward
        else:
            setattr(layer, name, own)
