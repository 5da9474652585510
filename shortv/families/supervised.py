"""Samples with their answers as training batches, labelled on the answer and the end of the turn alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shortv.errors import SampleError
from shortv.families.loading import LoadedModel
from shortv.families.preprocessing import Batch, Prompt, adds_special_tokens, batch_of, message_of, prompt_of
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
    loaded: LoadedModel, samples: Sequence[Sample], *, padding_side: Literal["left", "right"] | None = None
) -> Supervised:
    """Encode samples with their answers as the chat template writes them.

    Args:
        padding_side: the tokenizer's own unless given.

    Raises:
        SampleError: a sample without an answer, or that cannot be encoded; its message names the sample.
    """
    prompts, continuations = [], []
    before, after = answer_frame(loaded)
    for sample in samples:
        if not (sample.answer and sample.answer.strip()):
            message = f"sample {sample.sample_id!r} has no answer, and training needs one"
            raise SampleError(stage="prompt", error="no-answer", message=message)
        try:
            prompts.append(prompt_of(loaded, [message_of(sample)]))
        except SampleError as error:
            message = f"sample {sample.sample_id!r}: {error}"
            raise SampleError(stage=error.stage, error=error.error, message=message) from error
        continuations.append(f"{before}{sample.answer.strip()}{after}")
    return continued(loaded, prompts, continuations, padding_side=padding_side)


def continued(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    continuations: Sequence[str],
    *,
    padding_side: Literal["left", "right"] | None = None,
) -> Supervised:
    """Encode prompts with their continuations (answers of a data set, or the model's own), and label those alone.

    Raises:
        SampleError: a prompt cannot be encoded, or a continuation is empty or changed by the processor.
    """
    whole = [replace(prompt, continuation=text) for prompt, text in zip(prompts, continuations, strict=True)]
    batch = batch_of(loaded, whole, padding_side=padding_side)
    labels_BT = torch.full_like(batch.inputs["input_ids"], IGNORED)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        labels = continuation_ids(loaded, prompt.text, continuation)
        ids_T, mask_T = batch.inputs["input_ids"][row], batch.inputs["attention_mask"][row]
        at_K = mask_T.nonzero()[:, 0][-len(labels) :] if labels else mask_T.new_zeros(0)
        if not labels or ids_T[at_K].tolist() != labels:
            message = f"the processor does not keep the tokens of {continuation!r} behind the prompt"
            raise SampleError(stage="tokenise", error="answer-tokens", message=message)
        labels_BT[row, at_K] = ids_T[at_K]
    return Supervised(batch=batch.on(loaded), labels_BT=labels_BT.to(loaded.device))


def continuation_ids(loaded: LoadedModel, text: str, continuation: str) -> list[int]:
    """Return the tokens by which a prompt's text with a continuation differs from the text alone; images are ignored.

    Where the last token of the prompt merges with the first of the continuation, the merged token counts as part of
    the continuation.
    """
    tokenizer = loaded.processor.tokenizer
    special = adds_special_tokens(loaded, text)
    before, whole = (tokenizer(whole, add_special_tokens=special)["input_ids"] for whole in (text, text + continuation))
    same = next((at for at, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    ids: list[int] = whole[same:]
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
    at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    before, after = one[:at], one[at + 1 :]
    eos: str = loaded.processor.tokenizer.eos_token
    written = one == f"{before}{_ANSWERS[0]}{after}" and other == f"{before}{_ANSWERS[1]}{after}"
    if not written or not before.startswith(prompt):  # the template writes past answers in another way than new ones
        return "" if prompt[-1:].isspace() else " ", eos
    return before.removeprefix(prompt), after.rstrip() or eos
