"""Training batches: conversations as token ids, labels on the answers only, and pixels."""

import random
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from shortv.tiny.architecture import IMAGE, PATCH_SIZE, VISUAL_TOKENS
from shortv.tiny.conversations import Conversation, draw_conversation
from shortv.tiny.scenes import CELL, COLOURS, GRID, IMAGE_SIZE, PLACES, SHAPES, Scene, render

IGNORED = -100


class Batch(NamedTuple):
    """One training step's input, padded on the right: causal attention then needs no mask.

    P is patches: which colour and which shape each one's cell holds.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    pixels_BCHW: torch.Tensor
    colours_BP: torch.Tensor
    shapes_BP: torch.Tensor


def draw_batch(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    step: int,
    size: int,
    blank_share: float = 0.0,
    mix: str = "even",
) -> Batch:
    """Draw the batch of a step; it depends on seed and step alone, so a resumed run sees the same data.

    In `blank_share` of the conversations the image is blank while the answers stay: that teaches the model to
    answer each kind of question by frequency when it sees nothing, instead of anything at all.
    `mix` names which kinds of question are asked.
    """
    rng = random.Random(f"{seed}-training-{step}")
    conversations = [draw_conversation(rng, mix=mix) for _ in range(size)]
    rows = encode(tokenizer, conversations)
    length = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    input_ids = [ids + [pad] * (length - len(ids)) for ids, _ in rows]
    labels = [targets + [IGNORED] * (length - len(targets)) for _, targets in rows]
    blank_rng = random.Random(f"{seed}-blank-{step}")
    scenes = [
        Scene(objects=()) if blank_rng.random() < blank_share else conversation.scene for conversation in conversations
    ]
    images = np.stack([render(scene) for scene in scenes])
    contents = torch.tensor([patch_contents(scene) for scene in scenes])
    # The image processor's arithmetic for these settings: a mean and deviation of one half.
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return Batch(torch.tensor(input_ids), torch.tensor(labels), pixels, contents[..., 0], contents[..., 1])


def patch_places() -> list[int]:
    """Say for each patch which of the places it lies in."""
    side, share = IMAGE_SIZE // PATCH_SIZE, CELL // PATCH_SIZE
    return [row // share * GRID + column // share for row in range(side) for column in range(side)]


def patch_contents(scene: Scene) -> list[tuple[int, int]]:
    """Say for each patch which colour and shape its cell holds, counted from one; zero is an empty cell."""
    cells = {
        PLACES.index(thing.place): (1 + list(COLOURS).index(thing.colour), 1 + list(SHAPES).index(thing.shape))
        for thing in scene.objects
    }
    return [cells.get(place, (0, 0)) for place in patch_places()]


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
    """Turn conversations into token ids and labels, as the chat template and the processor lay them out."""
    prompts, answers = [], []
    for conversation in conversations:
        for index, turn in enumerate(conversation.turns):
            image = IMAGE * VISUAL_TOKENS + "\n" if index == 0 else ""
            prompts.append(f"USER: {image}{turn.prompt} ASSISTANT:")
            answers.append(f" {turn.answer}{tokenizer.eos_token}")
    prompt_ids = iter(tokenizer(prompts, add_special_tokens=False)["input_ids"])
    answer_ids = iter(tokenizer(answers, add_special_tokens=False)["input_ids"])
    rows = []
    for conversation in conversations:
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
        for _ in conversation.turns:
            prompt, answer = next(prompt_ids), next(answer_ids)
            ids += [*prompt, *answer]
            labels += [*(IGNORED for _ in prompt), *answer]
        rows.append((ids, labels))
    return rows
