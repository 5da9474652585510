"""The generators and their files: the shipped rows again, true to the pixels, balanced, and in disjoint splits."""

import io
import random
import re
from collections import Counter
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shortv.errors import Refused
from shortv.tiny.dataset import (
    SCHEMA,
    benchmark_samples,
    calibration_samples,
    new_benchmark_samples,
    to_table,
    training_samples,
)
from shortv.tiny.questions import KINDS, LEARNED_KINDS, NEW_KINDS, exact_match
from shortv.tiny.scenes import COLOURS, SHAPES, draw_scene, render
from tests.tiny_model import TINY, bundled

FILES = {"calibration": calibration_samples, "benchmark": benchmark_samples, "new_benchmark": new_benchmark_samples}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
NAMED = re.compile(rf"({'|'.join(COLOURS)}) (circle|square|triangle|cross)")


@cache
def rows(name):
    return pq.read_table(TINY / f"{name}.parquet").to_pylist()


@cache
def drawn(name):
    return FILES[name]()


def layouts(name):
    return {sample.scene.layout for sample in drawn(name)}


def read_objects(png):
    """Find each object in the pixels again: its place, and there its colour and shape."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    found = {}
    for index, place in enumerate(PLACES):
        row, column = divmod(index, 3)
        cell = pixels[20 * row : 20 * row + 20, 20 * column : 20 * column + 20]
        inked = (cell != 240).any(axis=-1)
        if inked.any():
            mean = cell[inked].mean(axis=0)
            colour = min(COLOURS, key=lambda name: abs(mean - COLOURS[name]).sum())
            found[place] = (colour, read_shape(inked))
    return found


def read_shape(inked):
    lines, columns = np.nonzero(inked)
    box = inked[lines.min() : lines.max() + 1, columns.min() : columns.max() + 1]
    if box.all():
        return "square"
    if not np.array_equal(box, box[::-1]):
        return "triangle"
    return "circle" if box.mean() > 0.65 else "cross"


def read_answer(kind, prompt, objects):
    """Answer a question from the objects and its words."""
    question = prompt.split("\n")[0]
    place = next((place for place in PLACES if place in question), "")
    colour = next((colour for colour in COLOURS if colour in question), "")
    named = NAMED.search(question)
    if kind == "count":
        return str(len(objects))
    if kind == "count-by-colour":
        return str(sum(seen == colour for seen, _ in objects.values()))
    if kind in ("colour-at-place", "shape-at-place"):
        return objects[place][kind == "shape-at-place"]
    if kind == "shape-of-colour":
        (shape,) = (shape for seen, shape in objects.values() if seen == colour)
        return shape
    if kind == "colour-of-shape":
        (colour,) = (colour for colour, seen in objects.values() if seen in question)
        return colour
    if kind == "describe":
        return ", ".join(f"a {colour} {shape} at the {place}" for place, (colour, shape) in objects.items()) + "."
    places = [place for place, thing in objects.items() if thing == named.groups()]
    if kind == "existence":
        return "yes" if places else "no"
    assert kind == "place-of-object" and len(places) == 1
    return places[0]


@pytest.mark.parametrize("name", FILES)
def test_the_generator_gives_the_shipped_rows_again_and_they_are_true(name):
    assert pq.read_schema(TINY / f"{name}.parquet").equals(SCHEMA)
    for row, sample in zip(rows(name), drawn(name), strict=True):
        turn = sample.turn
        shipped = (row["sample_id"], row["prompt"], row["answer"], row["kind"])
        assert shipped == (sample.sample_id, turn.prompt, turn.answer, turn.kind)
        # Pixels, not PNG bytes: another zlib may compress the same image differently.
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["images"][0]))), render(sample.scene))
        assert read_answer(row["kind"], row["prompt"], read_objects(row["images"][0])) == row["answer"]


def test_kinds_and_answers_are_balanced():
    for kind in KINDS:
        counts = Counter(row["answer"] for row in rows("benchmark") if row["kind"] == kind)
        assert max(counts.values()) - min(counts.values()) <= 1 and counts.total() in (166, 167)
    assert {(row["kind"], row["dataset"]) for row in rows("new_benchmark")} == {("shape-of-colour", "shapes_new")}
    assert Counter(row["answer"] for row in rows("new_benchmark")) == dict.fromkeys(SHAPES, 115)
    assert len({len(row["prompt"]) for row in rows("calibration")}) > 10
    assert sum(row["dataset"] == "shapes_describe" for row in rows("calibration")) == 16


def test_splits_share_no_layout():
    rng = random.Random(0)
    training = {draw_scene(rng, "training").layout for _ in range(1000)}
    training |= {sample.scene.layout for sample in training_samples(NEW_KINDS, 300, seed=0)}
    benchmarks = layouts("benchmark") | layouts("new_benchmark")
    assert (len(layouts("benchmark")), len(layouts("new_benchmark")), len(layouts("calibration"))) == (1000, 460, 64)
    assert not benchmarks & layouts("calibration") and not training & (benchmarks | layouts("calibration"))


def test_a_seed_decides_every_training_sample():
    samples = training_samples(LEARNED_KINDS, 21, seed=3)
    assert samples == training_samples(LEARNED_KINDS, 21, seed=3) != training_samples(LEARNED_KINDS, 21, seed=4)
    assert to_table(samples).column("kind").to_pylist() == [*LEARNED_KINDS] * 3
    for kinds, named in (((), "none given"), (("count", "nothing"), "nothing")):
        with pytest.raises(Refused, match=f"unknown kinds of question: {named}; choose from count"):
            training_samples(kinds, 1, seed=0)


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_new_questions_are_true_in_known_words(kind):
    table = to_table(training_samples((kind,), 100, seed=0)).to_pylist()
    for row in table:
        assert read_answer(kind, row["prompt"], read_objects(row["images"][0])) == row["answer"]
        # A word that the vocabulary lacks falls into single bytes.
        assert len(bundled().processor.tokenizer.tokenize(row["prompt"])) == len(row["prompt"].split()) + 1
    assert {row["answer"] for row in table} == set(SHAPES if kind == "shape-of-colour" else COLOURS)


def test_exact_match_forgives_only_case_blanks_and_a_full_stop():
    assert exact_match(" Red.", "red") and exact_match("red", "red")
    assert not any(exact_match(answer, "red") for answer in ("red circle", "", "dred"))
