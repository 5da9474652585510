"""The model's own answers, for training on samples that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from shortv.errors import SampleError
from shortv.families import LoadedModel
from shortv.families.preprocessing import batch_of, message_of, prompt_of
from shortv.sample import Sample


def with_own_answers(loaded: LoadedModel, samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """The samples, each with the model's own greedy answer.

    Raises:
        SampleError: a sample cannot be encoded, or the model says nothing.
    """
    texts = _written(loaded, samples, max_tokens)
    answered = []
    for sample, batched in zip(samples, texts, strict=True):
        # Padding moves the rounding: whether a sample can be used must not depend on those beside it.
        text = batched if batched.strip() else _written(loaded, [sample], max_tokens)[0]
        if not text.strip():
            message = f"the model's own answer to sample {sample.sample_id!r} is empty; leave the sample out"
            raise SampleError(stage="answer", error="no-answer", message=message)
        answered.append(replace(sample, answer=text))
    return answered


def _written(loaded: LoadedModel, samples: Sequence[Sample], max_tokens: int) -> list[str]:
    batch = batch_of(loaded, [prompt_of(loaded, [message_of(sample)]) for sample in samples], padding_side="left")
    inputs = batch.on(loaded).inputs
    tokenizer = loaded.processor.tokenizer
    ends, _ = loaded.end_tokens(())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    with torch.no_grad():
        ids_BT = loaded.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
        )
    texts: list[str] = tokenizer.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
