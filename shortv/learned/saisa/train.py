"""Training of SAISA's parts, a step at a time: cross-entropy on the answers, through the fast executor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from shortv.families import LoadedModel
from shortv.layers.apply import executing
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.saisa.run import ProjectedRun
from shortv.learned.system import Reduce, alone
from shortv.learned.training import Trainer, answer_logits
from shortv.sample import Sample


class ProjectorTrainer(Trainer[Projectors]):
    """Trains projectors, and in the second stage the parts' own copy of the language model."""

    parts_class = Projectors
    padding_side = None

    def __init__(self, loaded: LoadedModel, recipe: SaisaRecipe, reduce: Reduce = alone) -> None:
        """Copy what is trained. Raises Refused for a family or layers that cannot have projectors."""
        super().__init__(loaded, recipe, reduce)
        settings = recipe.settings(len(loaded.decoder.layers))
        self._modes = settings.modes(len(loaded.decoder.layers))
        self._begin(settings)
        self._parts.eval()

    def step(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Take one optimizer step; nothing in it is random.

        Returns:
            `loss`, in nats per answer token, `gradient_norm` before clipping, and `learning_rate`.

        Raises:
            SampleError: a sample has no answer or cannot be encoded; nothing was changed.
        """
        loaded, recipe, parts = self._loaded, self._recipe, self._parts
        given, stage = self.encoded(samples), recipe.stage(step)
        if stage.opens:
            self._optimizer.state.clear()
        parts.language_model.requires_grad_(stage.joint)
        trained = [weight for weight in parts.parameters() if weight.requires_grad]
        # A model in half precision computes in it, while the trained weights stay in float32.
        dtype = loaded.model.dtype
        half = torch.autocast(loaded.device.type, dtype=dtype, enabled=dtype != torch.float32)
        with executing(loaded.model, self._modes, ProjectedRun(loaded.decoder, self._modes, parts)), half:
            logits_NV, labels_N = answer_logits(loaded, given)
        loss = cross_entropy(logits_NV.float(), labels_N)
        self._backward(loss, trained)
        for weight in trained:
            if weight.grad is None:  # such as those of projectors in a batch without images
                weight.grad = torch.zeros_like(weight)
        if not stage.joint and recipe.first_stage == "shared":
            _share_gradients(list(parts.projectors.values()))
        norm = self._update(trained, stage.rate, gradient_norm=recipe.gradient_norm)
        return {"loss": float(loss.detach()), "gradient_norm": norm, "learning_rate": stage.rate}


def _share_gradients(copies: Sequence[nn.Module]) -> None:
    """Give copies of one module the mean of their gradients, so that they stay copies."""
    for same in zip(*(module.parameters() for module in copies), strict=True):
        mean = torch.stack([weight.grad for weight in same if weight.grad is not None]).mean(0)
        for weight in same:
            weight.grad = mean.clone()
