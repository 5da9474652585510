"""Training of SAISA's parts, a step at a time: cross-entropy on the answers, through the fast executor.

Shapes: B batch, T positions, V vocabulary, N answer tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.families import LoadedModel
from shortv.families.parts import Learned
from shortv.families.parts.saisa import Projectors
from shortv.families.supervised import IGNORED, Supervised, supervised
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.trainer import Executing, Reduce, alone, flat_state, restore_flat_state, set_learning_rate
from shortv.sample import Sample


def make_trainer(
    loaded: LoadedModel, recipe: SaisaRecipe, *, executing: Executing, reduce: Reduce = alone
) -> ProjectorTrainer:
    """Set up the training of SAISA's parts for a model.

    Raises:
        Refused: a family without a projector that layers could have of their own, or layers that are not there.
    """
    return ProjectorTrainer(loaded, recipe, executing=executing, reduce=reduce)


class ProjectorTrainer:
    """Trains projectors, and in the second stage the parts' own copy of the language model. The base stays as it is."""

    def __init__(self, loaded: LoadedModel, recipe: SaisaRecipe, *, executing: Executing, reduce: Reduce) -> None:
        """Copy what is trained; see `make_trainer`."""
        self.steps, self.batch_size = recipe.steps, recipe.batch_size
        self._loaded, self._recipe = loaded, recipe
        self._executing, self._reduce = executing, reduce
        num_layers = len(loaded.decoder.layers)
        self._parts = Projectors.build(loaded.decoder, recipe.settings(num_layers)).eval()
        self._modes = self._parts.settings.modes(num_layers)
        self._optimizer = _optimizer(self._parts, recipe)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step; nothing in it is random.

        Returns:
            `loss`, in nats per answer token, `gradient_norm` before clipping, and `learning_rate`.

        Raises:
            SampleError: a sample has no answer or cannot be encoded; nothing is changed then.
        """
        given = supervised(self._loaded, samples)
        stage = self._recipe.stage(step)
        if stage.opens:
            self._optimizer.state.clear()
        self._parts.language_model.requires_grad_(stage.joint)
        set_learning_rate(self._optimizer, stage.rate)
        trained = [weight for weight in self._parts.parameters() if weight.requires_grad]
        loss = self._loss(given)
        self._optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        _fill_gradients(trained)
        self._reduce(trained)
        if not stage.joint and self._recipe.first_stage == "shared":
            _share_gradients(list(self._parts.projectors.values()))
        norm = torch.nn.utils.clip_grad_norm_(trained, self._recipe.gradient_norm)
        self._optimizer.step()
        return {"loss": float(loss.detach()), "gradient_norm": float(norm), "learning_rate": stage.rate}

    def check(self, sample: Sample) -> None:
        """Raise the SampleError for which a step would refuse a sample."""
        supervised(self._loaded, [sample])

    def state(self) -> dict[str, Tensor]:
        """Weights of the parts and AdamW's moments, flat, on the CPU."""
        return flat_state(dict(self._parts.named_parameters()), self._optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises ShortVError when it does not fit."""
        restore_flat_state(state, dict(self._parts.named_parameters()), self._optimizer)

    def parts(self) -> Projectors:
        """The parts as trained so far."""
        return self._parts

    def _loss(self, given: Supervised) -> Tensor:
        model = self._loaded.model
        with self._executing(model, self._modes, Learned(parts=self._parts)), self._precision():
            logits_BTV = model(**given.batch.inputs, use_cache=False).logits
        # The logits of a position predict the next one's label.
        labels_BT = given.labels_BT[:, 1:].to(logits_BTV.device)
        learned_BT = labels_BT != IGNORED
        return cross_entropy(logits_BTV[:, :-1][learned_BT].float(), labels_BT[learned_BT])

    def _precision(self) -> AbstractContextManager[None]:
        """A model in half precision computes in it, while the trained weights are kept in float32."""
        dtype = self._loaded.model.dtype
        return torch.autocast(self._loaded.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _optimizer(parts: nn.Module, recipe: SaisaRecipe) -> torch.optim.AdamW:
    weights = list(parts.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.projector_rate)


def _fill_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Zeros where a batch says nothing, such as projectors without images: all workers average the same weights."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def _share_gradients(copies: Sequence[nn.Module]) -> None:
    """Give copies of one module the mean of their gradients, so that they stay copies."""
    for same in zip(*(module.parameters() for module in copies), strict=True):
        mean = torch.stack([weight.grad for weight in same if weight.grad is not None]).mean(0)
        for weight in same:
            weight.grad = mean.clone()
