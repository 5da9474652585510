"""Training of DyVTE's routers: one random layer a step, whose router learns whether an exit there is safe.

An exit is safe if the answer stays when visual tokens are missing from all later layers (paper, section 3).
Shapes: B batch, T positions, N answer tokens of all samples, V vocabulary, E twice the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shortv.errors import SampleError
from shortv.families import LoadedModel
from shortv.families.preprocessing import batch_of, message_of, prompt_of
from shortv.families.supervised import IGNORED, Supervised
from shortv.families.tokens import TokenTypes
from shortv.layers.apply import executing
from shortv.learned.dyvte.parts import EXIT, STAY, ExitRouters, TextRows
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.system import Reduce, alone, learning_rate
from shortv.learned.training import Trainer, answer_logits, generator
from shortv.plan import modes_of_exit
from shortv.sample import Sample


class RouterTrainer(Trainer[ExitRouters]):
    """Trains exit routers."""

    parts_class = ExitRouters

    def __init__(self, loaded: LoadedModel, recipe: DyvteRecipe, reduce: Reduce = alone) -> None:
        """Make routers with fresh weights. Raises Refused for a family that cannot have them."""
        super().__init__(loaded, recipe, reduce)
        self._begin(recipe.settings)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Train the router of one layer, the same on every worker.

        Returns:
            `loss` in nats, `layer`, `safe` (the share of samples that may exit there) and `accuracy` of its router.

        Raises:
            SampleError: a sample has no image, no answer (its own, or the model's where that is the target), or cannot
                be encoded.
        """
        recipe, layer = self._recipe, self.layer_of(step)
        state_BE, safe_B = self.labels(self.encoded(samples), layer)
        router = self._parts.routers[layer]
        logits_B2 = router(state_BE)
        classes_B = torch.where(safe_B, EXIT, STAY).to(logits_B2.device)
        loss = cross_entropy(logits_B2, classes_B)
        # Routers of other layers have no gradient, so AdamW leaves them and their moments alone.
        weights = list(router.parameters())
        self._backward(loss, weights)
        rate = learning_rate(step, steps=recipe.steps, peak=recipe.learning_rate, warmup_steps=recipe.warmup_steps)
        self._update(weights, rate)
        right_B = logits_B2.detach().argmax(1) == classes_B
        safe, right = torch.stack([safe_B.to(right_B.device), right_B]).float().mean(1).tolist()
        return {"loss": float(loss.detach()), "layer": float(layer), "safe": safe, "accuracy": right}

    def layer_of(self, step: int) -> int:
        """Return the exit layer of a step, drawn from the seed and the step alone."""
        drawn = torch.randint(len(self._parts.routers), (1,), generator=generator(self._recipe.seed, step, "exit"))
        return int(drawn)

    def encoded(self, samples: Sequence[Sample]) -> Supervised:
        """Encode samples with the answers that labels are made from. Raises SampleError."""
        for sample in samples:
            if not sample.images:
                message = f"sample {sample.sample_id!r} has no image, so there is nothing to exit; leave it out"
                raise SampleError(stage="prompt", error="no-image", message=message)
        if self._recipe.targets == "model":
            samples = with_own_answers(self._loaded, samples, self._recipe.answer_tokens)
        return super().encoded(samples)

    @torch.no_grad()
    def labels(self, batch: Supervised, layer: int) -> tuple[Tensor, Tensor]:
        """Return what a layer's router reads (B, E), and whether an exit there is safe (B,)."""
        model, decoder = self._loaded.model, self._loaded.decoder
        types = prompt_types(batch)
        text, states = TextRows.of(types, self._recipe.mean_over), list[Tensor]()
        handle = decoder.layers[layer].register_forward_hook(
            lambda _, __, output_BTD: states.append(text.state(output_BTD.flatten(0, 1)))
        )
        try:
            full = self._scores(batch)
        finally:
            handle.remove()
        if layer == len(decoder.layers) - 1:
            # No later layer could miss anything.
            return states[0], torch.ones_like(types.text_BT[:, 0])
        with executing(model, modes_of_exit(layer, len(decoder.layers))):
            left = self._scores(batch)
        return states[0], is_safe(full, left, self._recipe)

    def _scores(self, batch: Supervised) -> AnswerScores:
        logits_NV, labels_N = answer_logits(self._loaded, batch)
        count_B = (batch.labels_BT[:, 1:] != IGNORED).sum(1).to(logits_NV.device)
        nats_N = cross_entropy(logits_NV.float(), labels_N, reduction="none")
        return AnswerScores(logits_NV.argmax(-1), _mean_of_each(nats_N, count_B), count_B)


class AnswerScores(NamedTuple):
    """What a model predicts for given answers."""

    choice_N: Tensor
    """Its most likely token at each position."""
    nats_B: Tensor
    """Cross-entropy per token of each answer, in float32."""
    count_B: Tensor
    """Tokens of each answer."""


def _mean_of_each(values_N: Tensor, count_B: Tensor) -> Tensor:
    return torch.stack([part.mean() for part in torch.split(values_N, count_B.tolist())])


def is_safe(full: AnswerScores, left: AnswerScores, recipe: DyvteRecipe) -> Tensor:
    """Return whether visual tokens may leave (B,): the answers agree, by the recipe's rule."""
    share_B = _mean_of_each((full.choice_N == left.choice_N).float(), full.count_B)
    if recipe.rule == "exact":
        return share_B == 1
    bound_B = recipe.ce_ratio * full.nats_B + recipe.ce_slack
    # The code's "less than" would call an exit unsafe where nothing changed because both are exactly zero.
    return (share_B > recipe.agreement) & ((left.nats_B < bound_B) | (left.nats_B <= full.nats_B))


def prompt_types(batch: Supervised) -> TokenTypes:
    """Return what stands where in the prompts of a batch, without their answers."""
    types, answer_BT = batch.batch.types, batch.labels_BT != IGNORED
    before_BT = answer_BT.int().cumsum(1) == 0
    return TokenTypes(visual_BT=types.visual_BT, text_BT=types.text_BT & before_BT)


def with_own_answers(loaded: LoadedModel, samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Return the samples, each with the model's own greedy answer.

    Raises:
        SampleError: a sample cannot be encoded, or the model's answer is empty.
    """
    texts = _written(loaded, samples, max_tokens)
    answered = []
    for sample, batched in zip(samples, texts, strict=True):
        # Padding changes the rounding: whether a sample can be used must not depend on its neighbours.
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
