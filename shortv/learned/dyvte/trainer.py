"""Training of the routers on a frozen model: one random layer a step, its router learns whether an exit there is safe.

Shapes: B batch, T positions, K answer positions (padded), E twice the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shortv.errors import SampleError
from shortv.families import LoadedModel
from shortv.families.parts.dyvte import EXIT, STAY, ExitRouters, TextRows
from shortv.families.supervised import IGNORED, Supervised, supervised
from shortv.families.tokens import TokenTypes
from shortv.learned.dyvte.answers import with_own_answers
from shortv.learned.dyvte.labels import AnswerScores, is_safe
from shortv.learned.dyvte.recipe import Recipe
from shortv.learned.trainer import (
    Executing,
    Reduce,
    flat_state,
    generator,
    learning_rate,
    restore_flat_state,
    seeded,
    set_learning_rate,
)
from shortv.plan import modes_of_exit
from shortv.sample import Sample


def make_trainer(loaded: LoadedModel, recipe: Recipe, *, executing: Executing, reduce: Reduce) -> RouterTrainer:
    """Set up training of a model's routers. Raises Refused for a family that has none."""
    return RouterTrainer(loaded, recipe, executing=executing, reduce=reduce)


class RouterTrainer:
    """A Trainer of exit routers; the model itself is not changed."""

    def __init__(self, loaded: LoadedModel, recipe: Recipe, *, executing: Executing, reduce: Reduce) -> None:
        self.steps, self.batch_size = recipe.steps, recipe.batch_size
        self._loaded, self._recipe, self._executing, self._reduce = loaded, recipe, executing, reduce
        with seeded(recipe.seed, loaded.device):
            self._parts = ExitRouters.build(loaded.decoder, recipe.settings)
        self._optimizer = torch.optim.AdamW(
            self._parts.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Train the router of one layer, the same on every worker.

        Returns:
            `loss` in nats, `layer`, `safe` (the share of samples that may exit there) and `accuracy` of its router.

        Raises:
            SampleError: a sample has no image, no answer (its own, or the model's where that is the target), or cannot
                be encoded.
        """
        layer = self.layer_of(step)
        batch = self._encoded(samples)
        state_BE, safe_B = self._judged(batch, layer)
        set_learning_rate(self._optimizer, self._rate(step))
        router = self._parts.routers[layer]
        logits_B2 = router(state_BE)
        classes_B = torch.where(safe_B, EXIT, STAY).to(logits_B2.device)
        loss = cross_entropy(logits_B2, classes_B)
        # Routers of other layers have no gradient, so AdamW leaves them and their moments alone.
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._reduce(list(router.parameters()))
        self._optimizer.step()
        right_B = logits_B2.detach().argmax(1) == classes_B
        safe, right = torch.stack([safe_B.to(right_B.device), right_B]).float().mean(1).tolist()
        return {"loss": float(loss.detach()), "layer": float(layer), "safe": safe, "accuracy": right}

    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample."""
        self._encoded([sample])

    def layer_of(self, step: int) -> int:
        """The exit layer of a step, drawn from the seed and the step alone."""
        drawn = torch.randint(len(self._parts.routers), (1,), generator=generator(self._recipe.seed, step, "exit"))
        return int(drawn)

    def _rate(self, step: int) -> float:
        recipe = self._recipe
        return learning_rate(step, steps=recipe.steps, peak=recipe.learning_rate, warmup_steps=recipe.warmup_steps)

    def _encoded(self, samples: Sequence[Sample]) -> Supervised:
        for sample in samples:
            if not sample.images:
                message = f"sample {sample.sample_id!r} has no image, so there is nothing to exit; leave it out"
                raise SampleError(stage="prompt", error="no-image", message=message)
            if self._recipe.targets == "answers" and not (sample.answer and sample.answer.strip()):
                message = (
                    f"sample {sample.sample_id!r} has no answer; add one, or train with targets='model', on the "
                    "model's own answers"
                )
                raise SampleError(stage="prompt", error="no-answer", message=message)
        if self._recipe.targets == "model":
            samples = with_own_answers(self._loaded, samples, self._recipe.answer_tokens)
        return supervised(self._loaded, samples, padding_side="left")

    @torch.no_grad()
    def _judged(self, batch: Supervised, layer: int) -> tuple[Tensor, Tensor]:
        """What the layer's router reads (B, E), and whether an exit there is safe (B,)."""
        model, decoder = self._loaded.model, self._loaded.decoder
        types = prompt_types(batch)
        text, states = TextRows.of(types, self._recipe.mean_over), list[Tensor]()
        handle = decoder.layers[layer].register_forward_hook(
            lambda _, __, output_BTD: states.append(text.state(output_BTD.flatten(0, 1)))
        )
        try:
            full = self._scored(batch)
        finally:
            handle.remove()
        if layer == len(decoder.layers) - 1:
            # No layer is left that could miss anything.
            return states[0], torch.ones_like(types.text_BT[:, 0])
        with self._executing(model, modes_of_exit(layer, len(decoder.layers)), None):
            left = self._scored(batch)
        return states[0], is_safe(full, left, self._recipe)

    def _scored(self, batch: Supervised) -> AnswerScores:
        # Padded on the left, so answers stand at the end; the token before each predicts it.
        answer_T = (batch.labels_BT != IGNORED).any(0)
        keep = len(answer_T) - int(answer_T.int().argmax()) + 1
        logits_BTV = self._loaded.model(**batch.batch.inputs, use_cache=False, logits_to_keep=keep).logits
        labels_BK = batch.labels_BT[:, 1 - keep :].to(logits_BTV.device)
        return AnswerScores.of(logits_BTV[:, :-1], labels_BK)

    def state(self) -> dict[str, Tensor]:
        """Weights of the routers and moments of AdamW."""
        return flat_state(dict(self._parts.named_parameters()), self._optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises ShortVError when it does not fit."""
        restore_flat_state(state, dict(self._parts.named_parameters()), self._optimizer)

    def parts(self) -> ExitRouters:
        """The routers as trained so far."""
        return self._parts


def prompt_types(batch: Supervised) -> TokenTypes:
    """What stands where in the prompts of a batch: answers are left out, which no router sees."""
    types, answer_BT = batch.batch.types, batch.labels_BT != IGNORED
    before_BT = answer_BT.int().cumsum(1) == 0
    return TokenTypes(visual_BT=types.visual_BT, text_BT=types.text_BT & before_BT)
