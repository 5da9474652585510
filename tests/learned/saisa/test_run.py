"""SAISA: untrained parts freeze, text reads projections alone, and nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch

from shortv.errors import Refused, ShortVError
from shortv.families import decoder_of
from shortv.families.table import FAMILIES
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.learned.saisa.recipe import LanguageModel
from shortv.plan import Mode
from tests.law import SPECS, text_logits
from tests.learned.cases import CASES, FREEZE, freezing, projectors
from tests.models import KINDS, batch_of, loaded, random_model
from tests.parts import Trained, running


@pytest.mark.parametrize("kind", CASES["saisa"].families)
def test_untrained_parts_are_the_plan_that_freezes(kind: str) -> None:
    """Projectors that return the rows of the input embeddings are constant over layers: ShortV with N = L."""
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    learned = projectors(model, noise=0, language_model="all")
    with executing(model, FREEZE):
        expected = text_logits(model, batch)
    with running(executing, model, FREEZE, learned):
        assert torch.equal(text_logits(model, batch), expected)
    subset = freezing((0, 1))
    with executing(model, subset):
        expected = text_logits(model, batch)
    with running(executing, model, subset, projectors(model, (0, 1), noise=0)):
        assert torch.equal(text_logits(model, batch), expected)


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_text_does_not_depend_on_the_visual_rows_of_the_input(kind: str) -> None:
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    learned = projectors(model)
    with running(executing, model, FREEZE, learned):
        expected = text_logits(model, batch)
    noise = decoder_of(model).projector.register_forward_hook(lambda _, __, rows: torch.randn_like(rows))
    with running(executing, model, FREEZE, learned):
        assert torch.equal(text_logits(model, batch), expected)
    noise.remove()


@pytest.mark.parametrize(("choice", "tied"), [("attention", False), ("layers", False), ("all", False), ("all", True)])
def test_the_parts_language_model_stands_in_uncopied_and_leaves_again(choice: LanguageModel, tied: bool) -> None:
    model = random_model()
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = batch_of("llava", SPECS)
    parts = projectors(model, language_model=choice, noise=0.1).parts
    before = dict(model.named_parameters())
    trained = copy.deepcopy(model)
    for name, weight in parts.language_model.named_parameters():
        root = "lm_head" if name.startswith("head") else "model.language_model"
        trained.get_parameter(f"{root}.{name.removeprefix('head.')}").data.copy_(weight)
    alone = copy.deepcopy(parts)
    alone.language_model = torch.nn.Module()
    with running(executing, trained, FREEZE, Trained(parts=alone)):
        expected = text_logits(trained, batch)
    with running(executing, model, FREEZE, Trained(parts=parts)):
        assert torch.equal(text_logits(model, batch), expected)
        inside = {id(weight) for weight in model.parameters()}
        assert {id(weight) for weight in parts.language_model.parameters()} <= inside
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert not decoder_of(model).projector._forward_hooks


def test_images_whose_features_are_reused_are_an_error() -> None:
    model = random_model()
    first, second = batch_of("llava", [[3, "I", 2]]), batch_of("llava", [[4, "I", 1], [4, "I", 2]], seed=1)
    cache = VisionCache(loaded(model))
    with running(executing, model, FREEZE, projectors(model)):
        expected = text_logits(model, first)
        for batch in (first, second):
            with cache.reusing(batch):
                text_logits(model, batch)
        with cache.reusing(first), pytest.raises(ShortVError, match="4 visual tokens of this forward are not the 8"):
            text_logits(model, first)
        assert torch.equal(text_logits(model, first), expected)
        # The last images again are no others.
        with cache.reusing(first):
            assert torch.equal(text_logits(model, first), expected)
    other = batch_of("llava", [[3, "I", 2]], seed=2)
    with running(executing, model, FREEZE, projectors(model)):
        text_logits(model, other)
        with cache.reusing(first), pytest.raises(ShortVError, match="are not the 4"):
            text_logits(model, first)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = random_model()
    subset = projectors(model, (0, 2))
    for modes, why in {
        FREEZE: "layer 1 is freeze-visual, but these parts have no projector",
        (Mode.FREEZE_VISUAL, Mode.FULL, Mode.FULL, Mode.FULL): "layer 2 is full, but these parts have a projector",
        (Mode.FREEZE_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL): "must be full",
    }.items():
        with pytest.raises(Refused, match=why), running(executing, model, modes, subset):
            pass
    for kind in set(KINDS) - set(CASES["saisa"].families):
        other = random_model(kind)
        with pytest.raises(Refused, match=f"{FAMILIES[other.config.model_type].label} cannot have"):
            projectors(other)
