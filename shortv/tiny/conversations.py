"""Training conversations: several question turns about one image, sometimes with a describe turn."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shortv.tiny.questions import KINDS, Turn, ask
from shortv.tiny.scenes import Scene, draw_scene

DESCRIBE_SHARE = 0.5
DESCRIBE_FIRST_SHARE = 0.3
TURNS = 6

# What every conversation asks; the benchmark's other kinds fill it up. Kinds that the benchmark lacks are practice.
MIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "even": (),
        "search": ("existence", "place-of-object", "count-by-shape", "place-of-shape"),
        "where": ("existence", "place-of-object", "place-of-object", "place-of-shape", "place-of-colour"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One image and the turns about it; the first turn is what a single question looks like."""

    scene: Scene
    turns: tuple[Turn, ...]


def draw_conversation(rng: random.Random, split: str = "training", mix: str = "even") -> Conversation:
    """Draw a scene and six question turns about it, in half of the conversations with a describe turn.

    The mix of kinds is named in `MIXES`; `even` is one of each of the benchmark's.
    """
    scene = draw_scene(rng, split)
    turns = [turn for kind in _draw_kinds(rng, mix) if (turn := ask(kind, scene, rng)) is not None]
    if rng.random() < DESCRIBE_SHARE:
        # Mostly last: a description before the questions would let the model read the answers from text.
        first = rng.random() < DESCRIBE_FIRST_SHARE
        describe = ask("describe", scene, rng)
        assert describe is not None
        turns = [describe, *turns] if first else [*turns, describe]
    return Conversation(scene=scene, turns=tuple(turns))


def _draw_kinds(rng: random.Random, mix: str) -> list[str]:
    always = MIXES[mix]
    others = [kind for kind in KINDS if kind not in always]
    kinds = [*always, *rng.sample(others, TURNS - len(always))]
    return rng.sample(kinds, TURNS) if always else kinds
