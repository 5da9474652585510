"""Training batches: conversations as token ids, labels on the answers only, who sees whom, and pixels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from shortv.tiny.architecture import IMAGE, PATCH_SIZE, VISUAL_TOKENS
from shortv.tiny.conversations import Conversation, draw_conversation
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
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    step: int,
    size: int,
    blank_share: float = 0.0,
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
    rows = encode(tokenizer, conversations)
    segments_BT = _padded([row.segments for row in rows], PADDING)
    contents_BPC = torch.tensor([patch_contents(scene) for scene in scenes])
    pixels_BHWC = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return Batch(
        input_ids_BT=_padded([row.ids for row in rows], tokenizer.pad_token_id),
        labels_BT=_padded([row.labels for row in rows], IGNORED),
        positions_BT=_padded([row.positions for row in rows], 0),
        sees_B1TT=_sees(segments_BT)[:, None],
        # The image processor's arithmetic for these settings: a mean and deviation of one half.
        pixels_BCHW=pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
        colours_BP=contents_BPC[..., 0],
        shapes_BP=contents_BPC[..., 1],
    )


def encode(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]) -> list[Row]:
    """Turn conversations into rows, each turn as the chat template and the processor lay it out.

    Turns that are not joined stand side by side behind the image: each begins at the position after it.
    """
    head = [tokenizer.bos_token_id, *_tokens(tokenizer, ["USER: " + IMAGE * VISUAL_TOKENS])[0]]
    prompts = [
        ("USER: " if conversation.joined and index else "\n") + f"{turn.prompt} ASSISTANT:"
        for conversation in conversations
        for index, turn in enumerate(conversation.turns)
    ]
    answers = [f" {turn.answer}{tokenizer.eos_token}" for conversation in conversations for turn in conversation.turns]
    turns = iter(zip(_tokens(tokenizer, prompts), _tokens(tokenizer, answers), strict=True))
    rows = []
    for conversation in conversations:
        row = Row()
        row.append(head, start=0, segment=SHARED)
        for index in range(len(conversation.turns)):
            prompt, answer = next(turns)
            start, segment = (len(row.ids), SHARED) if conversation.joined else (len(head), 1 + index)
            row.append(prompt, start=start, segment=segment)
            row.append(answer, start=start + len(prompt), segment=segment, learned=True)
        rows.append(row)
    return rows


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


def _sees(segments_BT: torch.Tensor) -> torch.Tensor:
    query_BT1, key_B1T = segments_BT[:, :, None], segments_BT[:, None, :]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    return causal_TT & ((key_B1T == SHARED) | (key_B1T == query_BT1))


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
