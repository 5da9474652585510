"""Questions about a scene: six kinds with short answers, the describe turn, and kinds that the model never learned."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shortv.tiny.scenes import COLOURS, SHAPES, Scene

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
SHORT_ANSWER_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One user prompt and the answer to it."""

    kind: str
    prompt: str
    answer: str


def ask(kind: str, scene: Scene, rng: random.Random) -> Turn | None:
    """Ask the scene a question of this kind, or give None where the scene allows none."""
    asked = QUESTIONS[kind](scene, rng)
    if asked is None:
        return None
    names, answer = asked
    prompt = rng.choice(WORDINGS[kind]).format(**names)
    if kind != "describe" and rng.random() < SHORT_ANSWER_SHARE:
        prompt += SHORT_ANSWER
    return Turn(kind=kind, prompt=prompt, answer=answer)


Asked = tuple[dict[str, str], str] | None


def _count(scene: Scene, rng: random.Random) -> Asked:
    return {}, str(len(scene.objects))


def _count_colour(scene: Scene, rng: random.Random) -> Asked:
    counts = Counter(thing.colour for thing in scene.objects)
    # The count is drawn before the colour: most colours are absent from most scenes.
    answer = rng.choice(sorted({counts[colour] for colour in COLOURS}))
    colour = rng.choice([colour for colour in COLOURS if counts[colour] == answer])
    return {"colour": colour}, str(answer)


def _existence(scene: Scene, rng: random.Random) -> Asked:
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
        return {"colour": colour, "shape": shape}, "yes"
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    near = [(colour, shape) for colour, shape in absent if any(colour == seen for seen, _ in present)]
    colour, shape = rng.choice(near if near and rng.random() < 0.5 else absent)
    return {"colour": colour, "shape": shape}, "no"


def _colour_at(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(scene.objects)
    return {"place": thing.place}, thing.colour


def _shape_at(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(scene.objects)
    return {"place": thing.place}, thing.shape


def _place_of(scene: Scene, rng: random.Random) -> Asked:
    counts = Counter((thing.colour, thing.shape) for thing in scene.objects)
    alone = [thing for thing in scene.objects if counts[thing.colour, thing.shape] == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return {"colour": thing.colour, "shape": thing.shape}, thing.place


def _describe(scene: Scene, rng: random.Random) -> Asked:
    phrases = [f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.objects]
    return {}, ", ".join(phrases) + "."


QUESTIONS: Mapping[str, Callable[[Scene, random.Random], Asked]] = MappingProxyType(
    {
        "count": _count,
        "count-by-colour": _count_colour,
        "existence": _existence,
        "colour-at-place": _colour_at,
        "shape-at-place": _shape_at,
        "place-of-object": _place_of,
        "describe": _describe,
    }
)
KINDS = ("count", "count-by-colour", "existence", "colour-at-place", "shape-at-place", "place-of-object")

WORDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "count": (
            "How many objects are there?",
            "Count the objects.",
            "How many shapes do you see?",
        ),
        "count-by-colour": (
            "How many {colour} objects are there?",
            "Count the {colour} objects.",
            "How many shapes are {colour}?",
        ),
        "existence": (
            "Is there a {colour} {shape}?",
            "Does the picture show a {colour} {shape}?",
            "Do you see a {colour} {shape}?",
        ),
        "colour-at-place": (
            "What color is the object at the {place}?",
            "Which color do you see at the {place}?",
            "What color is at the {place}?",
        ),
        "shape-at-place": (
            "What shape is the object at the {place}?",
            "Which shape do you see at the {place}?",
            "What shape is at the {place}?",
        ),
        "place-of-object": (
            "Where is the {colour} {shape}?",
            "Where do you see the {colour} {shape}?",
            "At which place is the {colour} {shape}?",
        ),
        "describe": (
            "Describe the picture.",
            "Describe the objects in this picture.",
            "What does the picture show?",
        ),
    }
)


def _shape_of_colour(scene: Scene, rng: random.Random) -> Turn | None:
    counts = Counter(thing.colour for thing in scene.objects)
    alone = [thing for thing in scene.objects if counts[thing.colour] == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    prompt = rng.choice(("What shape is the {} object?", "Which shape is {}?", "What shape is {}?"))
    return Turn(kind="shape-of-colour", prompt=prompt.format(thing.colour), answer=thing.shape)


def _colour_of_shape(scene: Scene, rng: random.Random) -> Turn | None:
    counts = Counter(thing.shape for thing in scene.objects)
    alone = [thing for thing in scene.objects if counts[thing.shape] == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    prompt = rng.choice(("What color is the {}?", "Which color is the {}?", "What color do you see at the {}?"))
    return Turn(kind="colour-of-shape", prompt=prompt.format(thing.shape), answer=thing.colour)


NEW_KINDS: Mapping[str, Callable[[Scene, random.Random], Turn | None]] = MappingProxyType(
    {"shape-of-colour": _shape_of_colour, "colour-of-shape": _colour_of_shape}
)
"""Questions that the bundled model was not trained on: from one property of an object to another, without its place.

Every word of them is in the model's vocabulary, so that what is new is the question and not its spelling.
"""


def exact_match(answer: str, expected: str) -> bool:
    """Say whether an answer is the expected one, but for case, blanks around it and a closing full stop."""
    return answer.strip().rstrip(".").strip().lower() == expected.strip().rstrip(".").strip().lower()
