"""Completions and likelihoods of a batch of prompts, by the model in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from shortv.errors import SampleError
from shortv.families import LoadedModel
from shortv.families.preprocessing import Batch, EncodedPrompt, Preprocessor, Prompt, batch_of, encode_one, join
from shortv.families.supervised import continuation_ids
from shortv.layers.progress import prompted
from shortv.request import Completion, Likelihood


def generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], arguments: Mapping[str, Any], stop: Sequence[str] = ()
) -> list[Completion]:
    """Complete the prompts of a batch, which must all have images or all have none.

    Greedy completions do not depend on what else is in the batch, beyond rounding. Times are not measured.

    Args:
        arguments: for transformers' `generate`.
        stop: texts that end a completion and are not part of it.

    Raises:
        SampleError: as `batch_of`.
    """
    batch = batch_of(loaded, prompts, padding_side="left").on(loaded)
    width = batch.inputs["input_ids"].shape[1]
    tokenizer = loaded.processor.tokenizer
    ends, texts = loaded.end_tokens(stop)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    criteria = StoppingCriteriaList([_StopTexts(tokenizer, texts, width)] if texts else [])
    with torch.inference_mode():
        ids_BT = loaded.model.generate(
            **batch.inputs, **arguments, eos_token_id=ends, pad_token_id=pad, stopping_criteria=criteria
        )
    rows = zip(ids_BT[:, width:].tolist(), batch.types.n_text, batch.types.n_visual, strict=True)
    return [_completion(tokenizer, ids, texts, ends, pad, n_text, n_visual) for ids, n_text, n_visual in rows]


def _completion(
    tokenizer: Any, ids: list[int], stop: Sequence[str], ends: Sequence[int], pad: int, n_text: int, n_visual: int
) -> Completion:
    count = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    while stop and count == len(ids) and ids[-1:] == [pad]:
        # Padding after a stop text; a sequence without one goes on to the end and has no padding.
        ids = ids[:-1]
        count = len(ids)
    ended = count < len(ids)
    text = tokenizer.decode(ids[:count], skip_special_tokens=True)
    cut = min((at for at in (text.find(one) for one in stop) if at >= 0), default=len(text))
    return Completion(
        text=text[:cut],
        finish_reason="stop" if ended or cut < len(text) else "length",
        prompt_tokens=n_text + n_visual,
        visual_tokens=n_visual,
        # The model has generated the token that ends a completion too.
        completion_tokens=count + ended,
    )


class _StopTexts(StoppingCriteria):
    """Ends a sequence once its generated text holds a stop.

    transformers' own `stop_strings` also match across the end of the prompt, and tokens that decode to no text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._width = width
        # A character is at most four tokens (its bytes); the rest is for tokens that are no text.
        self._tail = 4 * max(map(len, stop)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        start = max(self._width, input_ids.shape[1] - self._tail)
        texts = self._tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)


def likelihoods(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[Likelihood]:
    """Score the continuations of a batch of prompts in one forward, in float32.

    The prompts must all have images or all have none. Prompt and continuation are tokenised as one text: where the
    last token of the prompt merges with the first of the continuation, the merged token belongs to the continuation.

    Raises:
        SampleError: as `encode_continuation`.
    """
    pairs = [encode_continuation(loaded, prompt) for prompt in prompts]
    batch = join(loaded, [encoded for encoded, _ in pairs], padding_side="left")
    return scored(loaded, batch, [labels for _, labels in pairs])


def encode_continuation(preprocessor: Preprocessor, prompt: Prompt) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """Encode a prompt with its continuation; also returns the tokens that are to be scored.

    Raises:
        SampleError: as `encode_one`; or the continuation is empty, or the processor changes its tokens.
    """
    labels = continuation_ids(preprocessor, prompt.text, prompt.continuation)
    if not labels:
        raise _unusable("the likelihood of an empty continuation is not defined; correct the task's choices")
    encoded = encode_one(preprocessor, prompt)
    if encoded.ids[-len(labels) :] != labels:
        raise _unusable(f"the tokens of the prompt do not end with those of {prompt.continuation!r:.100}")
    return encoded, tuple(labels)


def scored(loaded: LoadedModel, batch: Batch, labels: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Score the last tokens of each sequence of a batch in CPU memory that is padded on the left."""
    prompt_BT = torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool)
    for prompt_T, label in zip(prompt_BT, labels, strict=True):
        prompt_T[-len(label) :] = False
    with torch.inference_mode(), prompted(loaded.decoder, prompt_BT):
        output = loaded.model(**batch.on(loaded).inputs, use_cache=False, logits_to_keep=max(map(len, labels)) + 1)
    return [_score(logits_TV, label) for logits_TV, label in zip(output.logits, labels, strict=True)]


def _unusable(message: str) -> SampleError:
    return SampleError(stage="tokenise", error="continuation", message=message)


def _score(logits_TV: Tensor, labels: Sequence[int]) -> Likelihood:
    # The last position predicts what would come after the continuation.
    relevant_TV = logits_TV[-len(labels) - 1 : -1].float()
    labels_T = torch.tensor(labels, device=relevant_TV.device)
    chosen_T = relevant_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    is_greedy = bool((relevant_TV.argmax(-1) == labels_T).all())
    return Likelihood(log_probability=float(chosen_T.sum()), is_greedy=is_greedy)
