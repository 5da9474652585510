"""Questions about a scene: kinds with short answers, a describe turn, and the conversations of a training."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shortv.tiny.scenes import COLOURS, PLACES, SHAPES, Scene, SceneObject, draw_scene

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
SHORT_ANSWER_SHARE = 0.05
DESCRIBE_SHARE = 0.5
JOINED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One user prompt and the answer to it."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One image and the turns about it.

    `joined` turns follow each other as in a chat. The others each see the image and themselves alone, as the single
    questions of a benchmark do.
    """

    scene: Scene
    turns: tuple[Turn, ...]
    joined: bool


Asked = tuple[Mapping[str, str], str] | None
"""The names that a wording holds and the answer; None where a scene does not allow the question."""


def _count_by_colour(scene: Scene, rng: random.Random) -> Asked:
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


def _describe(scene: Scene, rng: random.Random) -> Asked:
    phrases = [f"a {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.objects]
    return {}, ", ".join(phrases) + "."


def _property(asked: str, *known: str) -> Callable[[Scene, random.Random], Asked]:
    """Ask for one property of an object that the known ones single out."""

    def names(thing: SceneObject) -> dict[str, str]:
        return {name: getattr(thing, name) for name in known}

    def ask_for(scene: Scene, rng: random.Random) -> Asked:
        every = [names(thing) for thing in scene.objects]
        alone = [thing for thing, own in zip(scene.objects, every, strict=True) if every.count(own) == 1]
        if not alone:
            return None
        thing = rng.choice(alone)
        return names(thing), getattr(thing, asked)

    return ask_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of question: how a scene is asked, in which words, and the answers that a benchmark balances."""

    ask: Callable[[Scene, random.Random], Asked]
    wordings: tuple[str, ...]
    answers: tuple[str, ...] = ()
    share: int = 0
    """Turns of this kind in a training conversation; kinds that need two properties of one object are asked most."""


QUESTIONS: Mapping[str, Kind] = {
    "count": Kind(
        ask=lambda scene, rng: ({}, str(len(scene.objects))),
        wordings=("How many objects are there?", "Count the objects.", "How many shapes do you see?"),
        answers=("2", "3", "4", "5"),
        share=1,
    ),
    "count-by-colour": Kind(
        ask=_count_by_colour,
        wordings=(
            "How many {colour} objects are there?",
            "Count the {colour} objects.",
            "How many shapes are {colour}?",
        ),
        answers=("0", "1", "2", "3"),
        share=2,
    ),
    "existence": Kind(
        ask=_existence,
        wordings=(
            "Is there a {colour} {shape}?",
            "Does the picture show a {colour} {shape}?",
            "Do you see a {colour} {shape}?",
        ),
        answers=("yes", "no"),
        share=3,
    ),
    "colour-at-place": Kind(
        ask=_property("colour", "place"),
        wordings=(
            "What color is the object at the {place}?",
            "Which color do you see at the {place}?",
            "What color is at the {place}?",
        ),
        answers=tuple(COLOURS),
        share=2,
    ),
    "shape-at-place": Kind(
        ask=_property("shape", "place"),
        wordings=(
            "What shape is the object at the {place}?",
            "Which shape do you see at the {place}?",
            "What shape is at the {place}?",
        ),
        answers=tuple(SHAPES),
        share=2,
    ),
    "place-of-object": Kind(
        ask=_property("place", "colour", "shape"),
        wordings=(
            "Where is the {colour} {shape}?",
            "Where do you see the {colour} {shape}?",
            "At which place is the {colour} {shape}?",
        ),
        answers=PLACES,
        share=3,
    ),
    "describe": Kind(
        ask=_describe,
        wordings=("Describe the picture.", "Describe the objects in this picture.", "What does the picture show?"),
    ),
    # The bundled model was not trained on these: from one property of an object to another, without its place. Their
    # words are in its vocabulary, so that the question is new and not its spelling.
    "shape-of-colour": Kind(
        ask=_property("shape", "colour"),
        wordings=("What shape is the {colour} object?", "Which shape is {colour}?", "What shape is {colour}?"),
        answers=tuple(SHAPES),
    ),
    "colour-of-shape": Kind(
        ask=_property("colour", "shape"),
        wordings=("What color is the {shape}?", "Which color is the {shape}?", "What color do you see at the {shape}?"),
        answers=tuple(COLOURS),
    ),
}
KINDS = tuple(name for name, kind in QUESTIONS.items() if kind.share)
"""The questions that the bundled model was trained on."""
LEARNED_KINDS = (*KINDS, "describe")
NEW_KINDS = ("shape-of-colour", "colour-of-shape")


def ask(kind: str, scene: Scene, rng: random.Random) -> Turn | None:
    """Ask the scene a question of this kind, or give None where the scene allows none."""
    asked = QUESTIONS[kind].ask(scene, rng)
    if asked is None:
        return None
    names, answer = asked
    prompt = rng.choice(QUESTIONS[kind].wordings).format(**names)
    if kind in KINDS and rng.random() < SHORT_ANSWER_SHARE:
        prompt += SHORT_ANSWER
    return Turn(kind=kind, prompt=prompt, answer=answer)


def draw_conversation(rng: random.Random, split: str = "training") -> Conversation:
    """Draw a scene and question turns of every kind about it in any order, in half of the cases with a describe turn.

    The describe turn is last: before the questions it would let a chat read the answers from text.
    """
    scene = draw_scene(rng, split)
    counts = [QUESTIONS[kind].share for kind in KINDS]
    kinds = rng.sample(KINDS, sum(counts), counts=counts)
    if rng.random() < DESCRIBE_SHARE:
        kinds.append("describe")
    turns = tuple(turn for kind in kinds if (turn := ask(kind, scene, rng)) is not None)
    return Conversation(scene=scene, turns=turns, joined=rng.random() < JOINED_SHARE)


def exact_match(answer: str, expected: str) -> bool:
    """Say whether an answer is the expected one, but for case, blanks around it and a closing full stop."""
    return answer.strip().rstrip(".").strip().lower() == expected.strip().rstrip(".").strip().lower()
