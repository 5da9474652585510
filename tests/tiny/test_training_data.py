"""Training samples: the same for a seed, from scenes that no benchmark has, and answers that the scene bears out."""

from __future__ import annotations

from collections import Counter

import pytest

from shortv.errors import Refused
from shortv.tiny.dataset import ANSWERS
from shortv.tiny.questions import NEW_KINDS
from shortv.tiny.training_data import LEARNED_KINDS, draw_samples, training_table
from tests.tiny_model import bundled


def test_a_seed_decides_every_row() -> None:
    table = training_table(LEARNED_KINDS, samples=21, seed=3)
    assert table.equals(training_table(LEARNED_KINDS, samples=21, seed=3))
    assert not table.equals(training_table(LEARNED_KINDS, samples=21, seed=4))
    assert table.column("kind").to_pylist() == [*LEARNED_KINDS] * 3


def test_training_and_held_out_scenes_have_no_layout_in_common() -> None:
    training = {sample.scene.layout for sample in draw_samples(tuple(NEW_KINDS), samples=200, seed=0)}
    held_out = {sample.scene.layout for sample in draw_samples(tuple(NEW_KINDS), samples=50, seed=0, split="benchmark")}
    assert not training & held_out


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_new_questions_have_one_right_answer_and_known_words(kind: str) -> None:
    samples = draw_samples((kind,), samples=200, seed=0)
    asked_by, told_by = ("colour", "shape") if kind == "shape-of-colour" else ("shape", "colour")
    for sample in samples:
        words = sample.turn.prompt.rstrip("?").split()
        meant = [thing for thing in sample.scene.objects if getattr(thing, asked_by) in words]
        assert [getattr(thing, told_by) for thing in meant] == [sample.turn.answer]
        tokens = bundled().processor.tokenizer.tokenize(sample.turn.prompt)
        # A word that the vocabulary lacks falls into single bytes.
        assert len(tokens) == len(words) + 1, tokens
    share = Counter(sample.turn.answer for sample in samples)
    assert set(share) == set(ANSWERS[kind]) and min(share.values()) > len(samples) / len(share) / 3


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(Refused, match="unknown kinds of question: none given"):
        draw_samples((), samples=1, seed=0)
