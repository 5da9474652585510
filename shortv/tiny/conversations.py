"""Training conversations: question turns about one image, sometimes with a describe turn."""

import random
from collections import Counter
from dataclasses import dataclass

from shortv.tiny.questions import Turn, ask
from shortv.tiny.scenes import Scene, draw_scene

# Kinds that need colour and shape of one object together are learned last and asked most.
TURNS = Counter(
    {
        "count": 1,
        "count-by-colour": 2,
        "existence": 3,
        "colour-at-place": 2,
        "shape-at-place": 2,
        "place-of-object": 3,
    }
)
DESCRIBE_SHARE = 0.5
JOINED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One image and the turns about it.

    `joined` turns follow each other as in a chat. The others each see the image and themselves alone, as the single
    questions of a benchmark do.
    """

    scene: Scene
    turns: tuple[Turn, ...]
    joined: bool


def draw_conversation(rng: random.Random, split: str = "training") -> Conversation:
    """Draw a scene and question turns of every kind about it in any order, in half of the cases with a describe turn.

    The describe turn is last: before the questions it would let a chat read the answers from text.
    """
    scene = draw_scene(rng, split)
    kinds = rng.sample(list(TURNS), TURNS.total(), counts=list(TURNS.values()))
    if rng.random() < DESCRIBE_SHARE:
        kinds.append("describe")
    turns = tuple(turn for kind in kinds if (turn := ask(kind, scene, rng)) is not None)
    return Conversation(scene=scene, turns=turns, joined=rng.random() < JOINED_SHARE)
