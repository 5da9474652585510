"""`with shortv.apply(model, plan):` - a transformers model follows a plan inside and is untouched outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.layers.apply import executing
from shortv.learned.files import PartsCache
from shortv.plan import Plan

KEEP = 2
"""How many parts stay with a model between two contexts: those of a 7B model may be gigabytes to read and check."""
_caches: WeakKeyDictionary[nn.Module, PartsCache] = WeakKeyDictionary()


@contextmanager
def apply(model: Any, plan: Plan | str | os.PathLike[str]) -> Iterator[list[str]]:
    """Run a transformers model under a plan: `model(...)`, `model.generate(...)` and everything built on them.

    No weights are copied; leaving the context, also by an exception, gives the model back bit for bit. Learned parts
    are loaded on first use, and the parts of the last two plans stay with the model.

    EAS and DyVTE read a prompt in the first forward of its KV cache: prefill it at once, because tokens that come
    later (chunks, turns, answers) give no information and let no visual token leave. Without a cache they cannot tell
    prompt from answer, and refuse a sequence that grows token by token.

    Args:
        plan: a Plan, a plan file, a folder with `shortv_plan.json`, or the name of a published plan.

    Yields:
        Warnings, one line each: another checkpoint or revision than the plan was made for.

    Raises:
        Refused: the plan does not fit the model, the model is in training mode or already under a plan, its attention
            implementation has no mask whose rows can be selected, the plan's learned parts do not exist or do not
            fit the model, or the plan downsamples images, which the model gets as pixels that are ready.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if plan.downsample is not None:
        raise Refused(
            f"plan {plan.name!r} gives the full model smaller images, and images are made before the model runs; "
            "evaluate it in a campaign or by lmms-eval"
        )
    architecture = Architecture.from_config_dict(model.config.to_dict())
    warnings = plan.check_fits(
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        model=getattr(model.config, "_name_or_path", "") or "this model",
        revision=getattr(model.config, "_commit_hash", None),
    )
    decoder = decoder_of(model)
    cache = _caches.setdefault(decoder.text, PartsCache(keep=KEEP))
    with executing(model, plan.modes, cache.run(plan, decoder, architecture)):
        yield warnings
