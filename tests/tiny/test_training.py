"""The training recipe: it goes on after a stop as if there had been none."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv.tiny.architecture import Architecture, build_model, build_tokenizer
from shortv.tiny.batches import IGNORED, collate, draw_batch, encode, patch_contents
from shortv.tiny.conversations import draw_conversation
from shortv.tiny.scenes import COLOURS, PLACES, SHAPES, Scene
from shortv.tiny.train import CHECKPOINT, Recipe, learning_rate, train
from shortv.tiny.trainee import Trainee

SMALL = Recipe(
    steps=6,
    batch_size=2,
    warmup_steps=2,
    architecture=Architecture(layers=2, vision_layers=1, width=32, feed_forward=32, heads=2, kv_heads=1),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(0)


def quiet(line: str) -> None:
    pass


def test_a_stopped_run_ends_with_the_same_weights(tmp_path):
    whole = train(SMALL, tmp_path / "whole", report=quiet)
    train(SMALL, tmp_path / "parts", stop_after=1, report=quiet)
    train(SMALL, tmp_path / "parts", stop_after=4, report=quiet)
    parts = train(SMALL, tmp_path / "parts", report=quiet)
    for (name, expected), (_, found) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_finished_run_is_not_trained_on_and_its_model_loads(tmp_path):
    trained = train(SMALL, tmp_path, report=quiet)
    written = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    train(SMALL, tmp_path, report=quiet)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == written
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", local_files_only=True)
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path / "model", local_files_only=True).image_token_id == 3


def test_another_recipe_does_not_continue_the_run(tmp_path):
    train(SMALL, tmp_path, stop_after=1, report=quiet)
    other = replace(SMALL, weight_decay=1.0)
    with pytest.raises(ValueError, match="another output folder"):
        train(other, tmp_path, report=quiet)


def test_only_answers_and_their_end_are_learned(tokenizer):
    conversation = draw_conversation(random.Random(5))
    [row] = encode(tokenizer, [conversation])
    learned = tokenizer.decode([token for token in row.labels if token != IGNORED])
    assert learned == "".join(f" {turn.answer}</s>" for turn in conversation.turns)
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))


def test_turns_that_are_not_joined_are_answered_as_if_each_were_alone(tokenizer):
    conversation = replace(draw_conversation(random.Random(5)), joined=False)
    alone = [replace(conversation, turns=(turn,)) for turn in conversation.turns]
    model = build_model(SMALL.architecture, tokenizer, seed=0).eval()

    def loss(*conversations):
        with torch.inference_mode():
            return Trainee(model, seed=0).losses(
                collate(tokenizer, conversations, [conversation.scene] * len(conversations))
            )[0]

    torch.testing.assert_close(loss(conversation), loss(*alone))
    assert not torch.isclose(loss(conversation), loss(replace(conversation, joined=True)))


def test_batches_depend_on_seed_and_step_alone(tokenizer):
    first, again = (draw_batch(tokenizer, seed=1, step=7, size=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.pixels_BCHW, draw_batch(tokenizer, seed=1, step=8, size=3).pixels_BCHW)


def test_blank_images_keep_their_answers(tokenizer):
    seen = draw_batch(tokenizer, seed=1, step=7, size=3)
    blank = draw_batch(tokenizer, seed=1, step=7, size=3, blank_share=1.0)
    assert torch.equal(seen.labels_BT, blank.labels_BT)
    assert blank.pixels_BCHW.unique().numel() == 1
    assert not blank.colours_BP.any()


def test_patches_know_their_cell():
    conversation = draw_conversation(random.Random(9))
    contents = np.array(patch_contents(conversation.scene)).reshape(6, 6, 2)
    for thing in conversation.scene.objects:
        row, column = divmod(PLACES.index(thing.place), 3)
        cell = contents[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 2)
        expected = (1 + list(COLOURS).index(thing.colour), 1 + list(SHAPES).index(thing.shape))
        assert (cell == expected).all()
    assert (contents[..., 0] > 0).sum() == 4 * len(conversation.scene.objects)
    assert not any(colour for colour, _ in patch_contents(Scene(objects=())))


def test_learning_rate_warms_up_and_falls_to_a_hundredth():
    recipe = Recipe(steps=31, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(31)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[30] == pytest.approx(0.01, abs=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
