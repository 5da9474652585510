"""The learned systems with parts that look as if they had been trained, for models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from shortv.families import decoder_of
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.eas.parts import Adapters
from shortv.learned.eas.recipe import EasSettings
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import LanguageModel, ProjectorSettings
from shortv.plan import Mode, modes_of_layers
from tests.models import KINDS, LAYERS
from tests.parts import Trained, shuffled

Modes = tuple[Mode, ...]
FULL: Modes = (Mode.FULL,) * LAYERS
FREEZE: Modes = (Mode.FREEZE_VISUAL,) * LAYERS
ALL = tuple(range(LAYERS))
MEANS = ("after-image", "all-text")


def adapters(model: Any, *, skipped: tuple[int, ...] = (1, 2), **options: Any) -> Trained:
    """Random adapters, a PIA in `skipped` layers."""
    kept = tuple(layer for layer in range(LAYERS) if layer not in skipped)
    settings = EasSettings(kept=kept, skipped=skipped, kept_rank=4, pia_rank=6, **options)
    return Trained(shuffled(Adapters.build(decoder_of(model), settings)))


def projectors(
    model: Any,
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    language_model: LanguageModel = "none",
    noise: float = 0.3,
) -> Trained:
    """Projectors, and weights of the language model, that are some way from the base model's."""
    parts = Projectors.build(decoder_of(model), ProjectorSettings(layers=layers, language_model=language_model))
    draw = torch.Generator().manual_seed(1)
    for weight in parts.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=draw)
    return Trained(parts.requires_grad_(False).eval())


def routers(model: Any, *, seed: int = 0, mean_over: Any = "after-image", threshold: float = 0.8) -> Trained:
    """Routers that are sure of one thing or the other, which depends on the sample."""
    torch.manual_seed(seed)
    parts = ExitRouters.build(decoder_of(model), RouterSettings(width=32, mean_over=mean_over))
    for weight in parts.parameters():
        weight.data *= 6
    return Trained(parts, threshold)


def skipping(skipped: tuple[int, ...]) -> Modes:
    return modes_of_layers(Mode.SKIP_ATTENTION, skipped, LAYERS)


def freezing(layers: tuple[int, ...]) -> Modes:
    return modes_of_layers(Mode.FREEZE_VISUAL, layers, LAYERS)


class Case(NamedTuple):
    """A system: the families that can have it, and some plans of it."""

    families: list[str]
    plans: Callable[[Any], list[tuple[Modes, Trained]]]
    """From a model; the parts of the first plan have gradients where gradients reach them."""


CASES = {
    "saisa": Case(
        [kind for kind in KINDS if kind not in ("llava-next", "llava-onevision", "qwen3-vl")],
        lambda model: [
            (FREEZE, projectors(model, language_model="all", noise=0.1)),
            (freezing((0, 2, 3)), projectors(model, (0, 2, 3))),
            (freezing((1,)), projectors(model, (1,), "attention")),
        ],
    ),
    "eas": Case(
        [kind for kind in KINDS if kind != "gemma3"],
        lambda model: [(skipping(one), adapters(model, skipped=one)) for one in ((1, 2), (0, 3), (), (0, 1, 2, 3))],
    ),
    "dyvte": Case(
        [kind for kind in KINDS if kind not in ("gemma3", "qwen3-vl")],
        lambda model: [(FULL, routers(model, seed=seed, mean_over=MEANS[seed % 2])) for seed in range(6)],
    ),
}
EVERYWHERE = [(system, family) for system, case in CASES.items() for family in case.families]
