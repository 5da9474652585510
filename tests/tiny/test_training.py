"""The training recipe: it goes on after a stop as if there had been none."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv.tiny.architecture import Architecture, build_model
from shortv.tiny.batches import IGNORED, collate, draw_batch, encode, patch_contents
from shortv.tiny.questions import draw_conversation
from shortv.tiny.scenes import COLOURS, PLACES, SHAPES
from shortv.tiny.train import CHECKPOINT, Recipe, Trainee, train
from tests.tiny_model import bundled

SMALL = Recipe(
    steps=4,
    batch_size=2,
    warmup_steps=2,
    architecture=Architecture(layers=2, vision_layers=1, width=32, feed_forward=32, heads=2, kv_heads=1),
)


def test_a_stopped_run_ends_with_the_same_weights_and_the_same_recipe_alone(tmp_path):
    whole = train(SMALL, tmp_path / "whole")
    train(SMALL, tmp_path / "parts", stop_after=1)
    with pytest.raises(ValueError, match="another output folder"):
        train(replace(SMALL, weight_decay=1.0), tmp_path / "parts")
    parts = train(SMALL, tmp_path / "parts")
    for (name, expected), (_, found) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    # A finished run is not trained on, and its model loads.
    written = (tmp_path / "parts" / CHECKPOINT).stat().st_mtime_ns
    train(SMALL, tmp_path / "parts")
    assert (tmp_path / "parts" / CHECKPOINT).stat().st_mtime_ns == written
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts" / "model", local_files_only=True)
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path / "parts" / "model", local_files_only=True).image_token_id == 3


def test_only_answers_and_their_end_are_learned_and_turns_side_by_side_are_answered_as_if_alone():
    tokenizer = bundled().processor.tokenizer
    conversation = replace(draw_conversation(random.Random(5)), joined=False)
    row = encode(tokenizer, conversation)
    learned = tokenizer.decode([token for token in row.labels if token != IGNORED])
    assert learned == "".join(f" {turn.answer}</s>" for turn in conversation.turns)
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))
    trainee = Trainee(build_model(SMALL.architecture, tokenizer, seed=0).eval(), seed=0)

    def loss(*conversations):
        with torch.inference_mode():
            return trainee.losses(collate(tokenizer, conversations, [conversation.scene] * len(conversations)))[0]

    alone = [replace(conversation, turns=(turn,)) for turn in conversation.turns]
    torch.testing.assert_close(loss(conversation), loss(*alone))
    assert not torch.isclose(loss(conversation), loss(replace(conversation, joined=True)))


def test_batches_depend_on_seed_and_step_alone_and_blank_images_keep_their_answers():
    tokenizer = bundled().processor.tokenizer
    first, again, other = (draw_batch(tokenizer, seed=1, step=step, size=3) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.pixels_BCHW, other.pixels_BCHW)
    blank = draw_batch(tokenizer, seed=1, step=7, size=3, blank_share=1.0)
    assert torch.equal(first.labels_BT, blank.labels_BT)
    assert blank.pixels_BCHW.unique().numel() == 1 and not blank.colours_BP.any()


def test_patches_know_their_cell():
    scene = draw_conversation(random.Random(9)).scene
    contents = np.array(patch_contents(scene)).reshape(6, 6, 2)
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), 3)
        cell = contents[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 2)
        assert (cell == (1 + list(COLOURS).index(thing.colour), 1 + list(SHAPES).index(thing.shape))).all()
    assert (contents[..., 0] > 0).sum() == 4 * len(scene.objects)


def test_learning_rate_warms_up_and_falls_to_a_hundredth():
    recipe = Recipe(steps=31, warmup_steps=4, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(31)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[30] == pytest.approx(0.01, abs=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
