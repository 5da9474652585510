"""Answers of a batch of prompts, under the generation settings of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from shortv.evals.decoding import BEAMS_AND_PENALTIES, SAMPLING, read_settings
from shortv.evals.prompts import NamedPrompt, inputs_of
from shortv.families import LoadedModel


class Answer(NamedTuple):
    """A text and how many tokens went in and came out."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How answers are made: arguments of `generate`, and the texts that end an answer."""

    arguments: Mapping[str, Any]
    stops: tuple[str, ...]


def decoding_of(gen_kwargs: Mapping[str, Any]) -> Decoding:
    """Read a task's `gen_kwargs` for `generate`. Raises Refused for a setting that this model does not have."""
    given, sampled, max_tokens, stops = read_settings(gen_kwargs)
    arguments: dict[str, Any] = {name: given[name] for name in BEAMS_AND_PENALTIES if name in given}
    # None overrides what the model's own generation settings say, and keeps transformers from warning about them.
    arguments |= {name: given[name] for name in SAMPLING if name in given} if sampled else dict.fromkeys(SAMPLING)
    return Decoding(arguments={**arguments, "do_sample": sampled, "max_new_tokens": max_tokens}, stops=stops)


def generate(loaded: LoadedModel, prompts: Sequence[NamedPrompt], decoding: Decoding) -> list[Answer]:
    """Answer the prompts of a batch, which must all have images or all have none.

    Greedy answers don't depend on what else is in the batch, beyond rounding.
    """
    inputs = inputs_of(loaded, prompts)
    width = inputs["input_ids"].shape[1]
    tokenizer = loaded.processor.tokenizer
    ends, texts = loaded.end_tokens(decoding.stops)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    criteria = StoppingCriteriaList([_Stops(tokenizer, texts, width)] if texts else [])
    with torch.inference_mode():
        ids_BT = loaded.model.generate(
            **inputs, **decoding.arguments, eos_token_id=ends, pad_token_id=pad, stopping_criteria=criteria
        )
    lengths = inputs["attention_mask"].sum(1).tolist()
    return [
        _answer(tokenizer, ids, texts, ends, pad, length)
        for ids, length in zip(ids_BT[:, width:].tolist(), lengths, strict=True)
    ]


def _answer(
    tokenizer: Any, ids: list[int], stops: Sequence[str], ends: Sequence[int], pad: int, input_tokens: int
) -> Answer:
    count = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    while stops and count == len(ids) and ids[-1:] == [pad]:
        # Padding after a stop; without one a row that goes on to the end was not padded.
        ids = ids[:-1]
        count = len(ids)
    # The token that ends an answer was made by the model too.
    made = count + (count < len(ids) and ids[count] in ends)
    text = tokenizer.decode(ids[:count], skip_special_tokens=True)
    cut = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))
    return Answer(text[:cut], input_tokens, made)


class _Stops(StoppingCriteria):
    """Ends a row once its generated text, the prompt apart, holds one of the stops."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._width = width
        # A character is at most four tokens (its bytes); the rest is for tokens that are no text.
        self._tail = 4 * max(map(len, stops)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        start = max(self._width, input_ids.shape[1] - self._tail)
        texts = self._tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
