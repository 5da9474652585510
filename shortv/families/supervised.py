"""Samples with their answers as training batches, labelled on the answer and the end of the turn alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from shortv.errors import SampleError
from shortv.families.loading import LoadedModel
from shortv.families.preprocessing import (
    Batch,
    PaddingSide,
    Preprocessor,
    adds_special_tokens,
    batch_of,
    message_of,
    prompt_of,
)
from shortv.request import Message
from shortv.sample import Sample

IGNORED = -100
"""Label of a position that takes no part in the loss, as in torch's cross-entropy."""
_ANSWERS = ("a", "b")
"""Two answers of one character each, which templates neither split nor strip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """A padded batch on the model's device, and the token that each position should hold.

    `labels_BT` is aligned with the inputs: the logits at position t - 1 predict the label at t. It is IGNORED
    everywhere but at the tokens of the answer, as the template writes it, and of the end of the turn.
    """

    batch: Batch
    labels_BT: Tensor


def supervised(
    loaded: LoadedModel, samples: Sequence[Sample], *, padding_side: PaddingSide | None = None
) -> Supervised:
    """Encode samples with their answers as the chat template writes them.

    Args:
        padding_side: the tokenizer's own unless given.

    Raises:
        SampleError: a sample has no answer or cannot be encoded (the message names it), or the processor changes an
            answer.
    """
    prompts = []
    before, after = answer_frame(loaded)
    for sample in samples:
        if not (sample.answer and sample.answer.strip()):
            message = f"sample {sample.sample_id!r} has no answer, and training needs one"
            raise SampleError("prompt", "no-answer", message)
        continuation = f"{before}{sample.answer.strip()}{after}"
        try:
            prompts.append(prompt_of(loaded, [message_of(sample)], continuation=continuation))
        except SampleError as error:
            raise SampleError(error.stage, error.error, f"sample {sample.sample_id!r}: {error}") from error
    batch = batch_of(loaded, prompts, padding_side=padding_side)
    labels_BT = torch.full_like(batch.inputs["input_ids"], IGNORED)
    for row, prompt in enumerate(prompts):
        labels = continuation_ids(loaded, prompt.text, prompt.continuation)
        ids_T, mask_T = batch.inputs["input_ids"][row], batch.inputs["attention_mask"][row]
        at_K = mask_T.nonzero()[:, 0][-len(labels) :]
        if not labels or ids_T[at_K].tolist() != labels:
            message = f"the processor does not keep the tokens of {prompt.continuation!r} behind the prompt"
            raise SampleError("tokenise", "answer-tokens", message)
        labels_BT[row, at_K] = ids_T[at_K]
    return Supervised(batch=batch.on(loaded), labels_BT=labels_BT.to(loaded.device))


def continuation_ids(preprocessor: Preprocessor, text: str, continuation: str) -> list[int]:
    """Return the tokens by which a prompt's text with a continuation differs from the text alone; images are ignored.

    Where the last token of the prompt merges with the first of the continuation, the merged token counts as part of
    the continuation.
    """
    tokenizer = preprocessor.processor.tokenizer
    special = adds_special_tokens(preprocessor, text)
    before, whole = (tokenizer(whole, add_special_tokens=special)["input_ids"] for whole in (text, text + continuation))
    ids: list[int] = whole[_common(before, whole) :]
    return ids


def answer_frame(loaded: LoadedModel) -> tuple[str, str]:
    """Return what the chat template writes before an answer, after the generation prompt, and to end the turn.

    Where the answer stands is found by rendering two conversations that differ in the answer alone: the template's own
    words may be any. Templates that write no end, such as LLaVA-1.5's, get the tokenizer's end of sequence.

    Raises:
        SampleError: the template cannot write a conversation with an answer.
    """
    request = Message(role="user", parts=("?",))
    prompt = prompt_of(loaded, [request]).text
    one, other = (
        prompt_of(loaded, [request, Message(role="assistant", parts=(answer,))], generation_prompt=False).text
        for answer in _ANSWERS
    )
    at = _common(one, other)
    before, after = one[:at], one[at + 1 :]
    eos: str = loaded.processor.tokenizer.eos_token
    written = one == f"{before}{_ANSWERS[0]}{after}" and other == f"{before}{_ANSWERS[1]}{after}"
    if not written or not before.startswith(prompt):  # the template writes past answers in another way than new ones
        return "" if prompt[-1:].isspace() else " ", eos
    return before.removeprefix(prompt), after.rstrip() or eos


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
