"""The shipped files: what is in them, and that the generator gives them again."""

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import shortv.tiny
from shortv.tiny.conversations import draw_conversation
from shortv.tiny.dataset import SCHEMA, benchmark_samples, calibration_samples, new_benchmark_samples
from shortv.tiny.questions import KINDS, exact_match
from shortv.tiny.scenes import SHAPES, draw_scene, render
from shortv.tiny.training_data import draw_samples
from tests.tiny.reading import read_answer, read_objects

FOLDER = Path(shortv.tiny.__file__).parent


def rows(name):
    return pq.read_table(FOLDER / f"{name}.parquet").to_pylist()


@pytest.mark.parametrize(
    ("name", "count", "most_bytes"),
    [("calibration", 64, 50_000), ("benchmark", 1000, 500_000), ("new_benchmark", 460, 100_000)],
)
def test_files_have_the_calibration_schema_and_are_small(name, count, most_bytes):
    path = FOLDER / f"{name}.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == count
    assert path.stat().st_size < most_bytes
    assert len(set(table["sample_id"].to_pylist())) == count


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("calibration", calibration_samples),
        ("benchmark", benchmark_samples),
        ("new_benchmark", new_benchmark_samples),
    ],
)
def test_generator_gives_the_shipped_rows_again(name, draw):
    samples = draw()
    for row, sample in zip(rows(name), samples, strict=True):
        assert (row["sample_id"], row["prompt"], row["answer"], row["kind"]) == (
            sample.sample_id,
            sample.turn.prompt,
            sample.turn.answer,
            sample.turn.kind,
        )
        # Pixels, not PNG bytes: another zlib may compress the same image differently.
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["images"][0]))), render(sample.scene))


def test_same_seed_same_conversation_and_other_seed_another():
    first, again, other = (draw_conversation(random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_share_no_layout():
    benchmark = {sample.scene.layout for sample in benchmark_samples()}
    calibration = {sample.scene.layout for sample in calibration_samples()}
    rng = random.Random(0)
    training = {draw_scene(rng, "training").layout for _ in range(3000)}
    new = {sample.scene.layout for sample in new_benchmark_samples()}
    new_training = {sample.scene.layout for sample in draw_samples(["shape-of-colour"], samples=1000, seed=0)}
    assert (len(benchmark), len(calibration), len(new)) == (1000, 64, 460)
    assert not (benchmark | new) & calibration
    assert not (training | new_training) & (benchmark | calibration | new)


@pytest.mark.parametrize("name", ["calibration", "benchmark", "new_benchmark"])
def test_answers_are_right_by_an_independent_reading_of_the_pixels(name):
    for row in rows(name):
        objects = read_objects(row["images"][0])
        assert read_answer(row["kind"], row["prompt"], objects) == row["answer"], row["sample_id"]


def test_benchmark_kinds_and_answers_are_balanced():
    asked = rows("benchmark")
    for kind in KINDS:
        counts = Counter(row["answer"] for row in asked if row["kind"] == kind)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) in (166, 167)


def test_the_new_benchmark_asks_one_new_kind_with_balanced_answers():
    asked = rows("new_benchmark")
    assert {(row["kind"], row["dataset"]) for row in asked} == {("shape-of-colour", "shapes_new")}
    assert Counter(row["answer"] for row in asked) == dict.fromkeys(SHAPES, 115)


def test_prompts_have_different_lengths_and_calibration_describes():
    asked = rows("calibration")
    assert len({len(row["prompt"]) for row in asked}) > 10
    assert sum(row["kind"] == "describe" for row in asked) == 16


@pytest.mark.parametrize(
    ("answer", "right"), [(" Red.", True), ("red", True), ("red circle", False), ("", False), ("dred", False)]
)
def test_exact_match_forgives_only_case_blanks_and_a_full_stop(answer, right):
    assert exact_match(answer, "red") is right
