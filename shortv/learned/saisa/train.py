"""Training of SAISA's parts, a step at a time: cross-entropy on the answers, through the fast executor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortv.families import LoadedModel
from shortv.families.supervised import Supervised, supervised
from shortv.layers.apply import executing
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.saisa.run import ProjectedRun
from shortv.learned.system import Reduce
from shortv.learned.training import Trainer, adamw, answer_logits, set_learning_rate
from shortv.sample import Sample


class ProjectorTrainer(Trainer[Projectors]):
    """Trains projectors, and in the second stage the parts' own copy of the language model."""

    def __init__(self, loaded: LoadedModel, recipe: SaisaRecipe, reduce: Reduce) -> None:
        """Copy what is trained. Raises Refused for a family or layers that cannot have projectors."""
        super().__init__(loaded, recipe, reduce)
        self._recipe = recipe
        num_layers = len(loaded.decoder.layers)
        self._parts = Projectors.build(loaded.decoder, recipe.settings(num_layers)).eval()
        self._modes = self._parts.settings.modes(num_layers)
        self._optimizer = adamw(self._parts, rate=recipe.projector_rate, weight_decay=recipe.weight_decay)

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step; nothing in it is random.

        Returns:
            `loss`, in nats per answer token, `gradient_norm` before clipping, and `learning_rate`.

        Raises:
            SampleError: a sample has no answer or cannot be encoded; nothing was changed.
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

    def _loss(self, given: Supervised) -> Tensor:
        run = ProjectedRun(self._loaded.decoder, self._modes, self._parts)
        with executing(self._loaded.model, self._modes, run), self._precision():
            logits_NV, labels_N = answer_logits(self._loaded, given)
        return cross_entropy(logits_NV.float(), labels_N)

    def _precision(self) -> AbstractContextManager[None]:
        """A model in half precision computes in it, while the trained weights stay in float32."""
        dtype = self._loaded.model.dtype
        return torch.autocast(self._loaded.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _fill_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Give zeros to weights without a gradient, such as projectors without images: all workers average the same."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def _share_gradients(copies: Sequence[nn.Module]) -> None:
    """Give copies of one module the mean of their gradients, so that they stay copies."""
    for same in zip(*(module.parameters() for module in copies), strict=True):
        mean = torch.stack([weight.grad for weight in same if weight.grad is not None]).mean(0)
        for weight in same:
            weight.grad = mean.clone()
