"""Run a transformers model with one mode per decoder layer, and leave it untouched afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from shortv.errors import Refused
from shortv.families import Decoder, decoder_of
from shortv.families.loading import ATTENTION_IMPLEMENTATIONS
from shortv.layers.fast import PlannedLayer, execute
from shortv.layers.progress import LearnedRun, Progress
from shortv.plan import WORK, Mode, Work, parse_mode, works_of

_APPLIED = "_shortv_applied"


@contextmanager
def executing(model: Any, modes: Sequence[Mode], run: LearnedRun | None = None) -> Iterator[None]:
    """Run a model under modes, one per layer, and what a learned system adds to them.

    No weights are copied; leaving the context, also by an exception, gives the model back bit for bit.

    Raises:
        Refused: the modes do not fit the model, the model is in training mode or already under a plan, or its
            attention implementation has no mask whose rows can be selected.
    """
    decoder = decoder_of(model)
    modes = tuple(parse_mode(mode) for mode in modes)
    progress, works = Progress(decoder, modes, run), works_of(modes)
    _check(model)
    with ExitStack() as undo:
        token = object()
        # setdefault is atomic: of two threads, one finds the token of the other. It stands on the decoder, which any
        # wrapper of the model shares.
        if decoder.text.__dict__.setdefault(_APPLIED, token) is not token:
            raise Refused("this model is already under a plan; leave that context first (plans do not nest or overlap)")
        undo.callback(decoder.text.__dict__.pop, _APPLIED)
        if run is not None or set(modes) != {Mode.FULL}:
            progress.attach(model, undo)
        if run is not None:
            run.attach(model, progress, undo)
        for index, work in enumerate(works):
            # A full layer is the model's own.
            executor = run.executor(index) if run is not None else execute if work != WORK[Mode.FULL] else None
            if executor is not None:
                _patch(decoder, index, works, executor, progress, undo)
        yield


def _check(model: Any) -> None:
    if model.training:
        raise Refused("the model is in training mode, where a plan would be silently wrong; call model.eval() first")
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTION_IMPLEMENTATIONS:
        raise Refused(
            f"attention implementation {attention!r} gives layers no mask whose rows can be selected; "
            f"load the model with one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


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
    """Remove our forward from where it is now: accelerate's hooks may have come or gone in between."""
    own = ours.args[0].own
    for name in ("forward", "_old_forward"):
        if layer.__dict__.get(name) is not ours:
            continue
        if name == "forward" and getattr(own, "__func__", None) is type(layer).forward:
            del layer.forward
        else:
            setattr(layer, name, own)
