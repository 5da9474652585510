"""Training batches: conversations as token ids, labels on the answers only, who sees whom, and pixels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from shortv.tiny.architecture import IMAGE, PATCH_SIZE, VISUAL_TOKENS
from shortv.tiny.questions import Conversation, draw_conversation
from shortv.tiny.scenes import CELL, COLOURS, GRID, IMAGE_SIZE, PLACES, SHAPES, Scene, render

IGNORED = -100
SHARED = 0
PADDING = -1


class Batch(NamedTuple):
    """One training step's input, padded on the right.

    T is positions, P is patches: which colour and which shape each one's cell holds. `sees_B1TT` is true where a
    query's row may attend to a key's column.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    sees_B1TT: torch.Tensor
    pixels_BCHW: torch.Tensor
    colours_BP: torch.Tensor
    shapes_BP: torch.Tensor


@dataclass(slots=True)
class Row:
    """A conversation as tokens; a token sees those before it in its own segment and in the shared one."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)

    def append(self, ids: list[int], *, start: int, segment: int, learned: bool = False) -> None:
        """Append tokens at positions from `start`."""
        self.ids += ids
        self.labels += ids if learned else [IGNORED] * len(ids)
        self.positions += range(start, start + len(ids))
        self.segments += [segment] * len(ids)


def draw_batch(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, step: int, size: int, blank_share: float = 0.0
) -> Batch:
    """Draw the batch of a step; it depends on seed and step alone, so a resumed run sees the same data.

    In `blank_share` of the conversations the image is blank while the answers stay: that teaches the model to
    answer each kind of question by frequency when it sees nothing, instead of anything at all.
    """
    rng, blank_rng = (random.Random(f"{seed}-{purpose}-{step}") for purpose in ("training", "blank"))
    conversations = [draw_conversation(rng) for _ in range(size)]
    empty = Scene(objects=())
    scenes = [empty if blank_rng.random() < blank_share else conversation.scene for conversation in conversations]
    return collate(tokenizer, conversations, scenes)


def collate(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation], scenes: Sequence[Scene]
) -> Batch:
    """Make a batch of conversations, each with the scene that its image shows."""
    rows = [encode(tokenizer, conversation) for conversation in conversations]

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(getattr(row, name)) for row in rows], batch_first=True, padding_value=value)

    segments_BT = padded("segments", PADDING)
    query_BT1, key_B1T = segments_BT[:, :, None], segments_BT[:, None, :]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    sees_BTT = causal_TT & ((key_B1T == SHARED) | (key_B1T == query_BT1))
    contents_BPC = torch.tensor([patch_contents(scene) for scene in scenes])
    pixels_BHWC = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return Batch(
        input_ids_BT=padded("ids", tokenizer.pad_token_id),
        labels_BT=padded("labels", IGNORED),
        positions_BT=padded("positions", 0),
        sees_B1TT=sees_BTT[:, None],
        # The image processor's arithmetic for these settings: a mean and deviation of one half.
        pixels_BCHW=pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
        colours_BP=contents_BPC[..., 0],
        shapes_BP=contents_BPC[..., 1],
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Row:
    """Turn a conversation into a row, each turn as the chat template and the processor lay it out.

    Turns that are not joined stand side by side behind the image: each begins at the position after it.
    """
    joined, texts = conversation.joined, ["USER: " + IMAGE * VISUAL_TOKENS]
    for index, turn in enumerate(conversation.turns):
        texts.append(("USER: " if joined and index else "\n") + f"{turn.prompt} ASSISTANT:")
        texts.append(f" {turn.answer}{tokenizer.eos_token}")
    head, *tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    head = [tokenizer.bos_token_id, *head]
    row = Row()
    row.append(head, start=0, segment=SHARED)
    for index, (prompt, answer) in enumerate(zip(tokens[::2], tokens[1::2], strict=True)):
        start, segment = (len(row.ids), SHARED) if joined else (len(head), 1 + index)
        row.append(prompt, start=start, segment=segment)
        row.append(answer, start=start + len(prompt), segment=segment, learned=True)
    return row


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
