"""How likely a model finds given continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shortv.errors import ShortVError
from shortv.evals.prompts import NamedPrompt, inputs_of
from shortv.families import LoadedModel
from shortv.families.supervised import continuation_ids
from shortv.layers.prompted import prompted
from shortv.request import Likelihood


def likelihoods(loaded: LoadedModel, prompts: Sequence[NamedPrompt]) -> list[Likelihood]:
    """Score the continuations of a batch of prompts in one forward, in float32.

    Prompt and continuation are tokenised as one text. Where the last token of the prompt merges with the first of the
    continuation, the merged token counts as part of the continuation.

    Raises:
        ShortVError: a continuation is empty, or the processor changes its tokens beside an image.
    """
    labels = [_labels(loaded, prompt) for prompt in prompts]
    inputs = inputs_of(loaded, prompts)
    for prompt, label, ids_T in zip(prompts, labels, inputs["input_ids"], strict=True):
        if ids_T[-len(label) :].tolist() != label:
            raise ShortVError(f"the tokens of {prompt.name} do not end with those of {prompt.continuation!r}")
    keep = max(map(len, labels)) + 1
    prompt_BT = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for row_T, label in zip(prompt_BT, labels, strict=True):
        row_T[-len(label) :] = False
    with torch.inference_mode(), prompted(loaded.decoder, prompt_BT):
        logits_BTV = loaded.model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return [_score(logits_TV, label) for logits_TV, label in zip(logits_BTV, labels, strict=True)]


def _labels(loaded: LoadedModel, prompt: NamedPrompt) -> list[int]:
    labels = continuation_ids(loaded, prompt.prompt.text, prompt.continuation)
    if not labels:
        raise ShortVError(f"{prompt.name} asks for the likelihood of an empty continuation; correct the task's choices")
    return labels


def _score(logits_TV: torch.Tensor, labels: list[int]) -> Likelihood:
    # The last position predicts what would come after the continuation.
    relevant_TV = logits_TV[-len(labels) - 1 : -1].float()
    labels_T = torch.tensor(labels, device=relevant_TV.device)
    chosen_T = relevant_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    return Likelihood(float(chosen_T.sum()), bool((relevant_TV.argmax(-1) == labels_T).all()))
