"""SAISA: fast equals reference, untrained parts freeze, text reads projections alone, and nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from shortv.errors import Refused, ShortVError
from shortv.families import Batch, decoder_of
from shortv.families.table import FAMILIES
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import LanguageModel, ProjectorSettings
from shortv.plan import Mode, modes_of_layers
from tests.law import SPECS, assert_law, generated, in_dtype, text_logits
from tests.models import KINDS, LAYERS, Spec, batch_of, loaded, random_model
from tests.parts import Trained, running

FREEZE = (Mode.FREEZE_VISUAL,) * LAYERS
ALL = tuple(range(LAYERS))
PROJECTED = [kind for kind in KINDS if kind not in ("llava-next", "llava-onevision", "qwen3-vl")]


def parts_for(
    model: Any, layers: tuple[int, ...] = ALL, language_model: LanguageModel = "none", noise: float = 0.3
) -> Projectors:
    parts = Projectors.build(decoder_of(model), ProjectorSettings(layers=layers, language_model=language_model))
    draw = torch.Generator().manual_seed(1)
    for weight in parts.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=draw)
    return parts.requires_grad_(False).eval()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", PROJECTED)
def test_fast_equals_reference(kind: str, padding: str) -> None:
    model = random_model(kind)
    batch = batch_of(kind, SPECS, padding=padding)
    before = text_logits(model, batch)
    for layers in (ALL, (0, 2, 3), (1,)):
        modes, learned = modes_of_layers(Mode.FREEZE_VISUAL, layers, LAYERS), Trained(parts=parts_for(model, layers))
        with running(reference, model, modes, learned):
            expected = text_logits(model, batch)
        with executing(model, modes):
            frozen = text_logits(model, batch)
        with running(executing, model, modes, learned):
            assert_law(text_logits(model, batch, use_cache=False), expected)
            assert_law(text_logits(model, batch, use_cache=True), expected)
        assert (frozen - expected).abs().max() > 1e-2 * expected.abs().max()
    assert torch.equal(text_logits(model, batch), before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
@pytest.mark.parametrize("kind", PROJECTED)
def test_generation_equals_reference(kind: str, options: dict[str, Any]) -> None:
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    learned = Trained(parts=parts_for(model, language_model="attention", noise=0.1))
    with running(reference, model, FREEZE, learned):
        expected = generated(model, batch, **options)
    with running(executing, model, FREEZE, learned):
        assert generated(model, batch, **options) == expected
        assert generated(model, batch, **options) == expected


@pytest.mark.parametrize("kind", PROJECTED)
def test_untrained_parts_are_the_plan_that_freezes(kind: str) -> None:
    """Projectors that return the rows of the input embeddings are constant over layers: ShortV with N = L."""
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    learned = Trained(parts=parts_for(model, noise=0, language_model="all"))
    with executing(model, FREEZE):
        expected = text_logits(model, batch)
    with running(executing, model, FREEZE, learned):
        assert torch.equal(text_logits(model, batch), expected)
    subset = modes_of_layers(Mode.FREEZE_VISUAL, (0, 1), LAYERS)
    with executing(model, subset):
        expected = text_logits(model, batch)
    with running(executing, model, subset, Trained(parts=parts_for(model, (0, 1), noise=0))):
        assert torch.equal(text_logits(model, batch), expected)


@pytest.mark.parametrize("kind", PROJECTED)
def test_text_does_not_depend_on_the_visual_rows_of_the_input(kind: str) -> None:
    model = random_model(kind)
    batch = batch_of(kind, SPECS)
    learned = Trained(parts=parts_for(model))
    with running(executing, model, FREEZE, learned):
        expected = text_logits(model, batch)
    noise = decoder_of(model).projector.register_forward_hook(lambda _, __, rows: torch.randn_like(rows))
    with running(executing, model, FREEZE, learned):
        assert torch.equal(text_logits(model, batch), expected)
    noise.remove()


def test_prompts_without_images_run_on_the_plain_language_model() -> None:
    model = random_model()
    batch = batch_of("llava", [[4], [7]])
    expected = text_logits(model, batch)
    with running(executing, model, FREEZE, Trained(parts=parts_for(model))):
        assert torch.equal(text_logits(model, batch), expected)


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl", "internvl"])
def test_a_batch_gives_what_its_prompts_give_alone(kind: str) -> None:
    model = random_model(kind)
    specs: list[Spec] = [[3, "I", 2], ["I", 5, "I", 1], [1, "I", 9]]
    learned = Trained(parts=parts_for(model))
    batch = batch_of(kind, specs)
    width = batch.types.text_BT.shape[1]
    with running(executing, model, FREEZE, learned), torch.inference_mode():
        together = model(**batch.inputs).logits
        for row, length in enumerate(batch.types.real_BT.sum(1).tolist()):
            # Prompts are drawn by their place; the others of this batch are cut off again.
            alone = _only(kind, specs, row)
            assert_law(together[row, width - length :], model(**alone.inputs).logits[0])


def _only(kind: str, specs: list[Spec], row: int) -> Batch:
    from tests.models import make_batch, prompts_of

    return make_batch(kind, [prompts_of(kind, specs)[row]])


@pytest.mark.parametrize("choice", ["attention", "layers", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_language_model_stands_in_uncopied_and_leaves_again(choice: LanguageModel, tied: bool) -> None:
    model = random_model()
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = batch_of("llava", SPECS)
    parts = parts_for(model, language_model=choice, noise=0.1)
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


def test_gradients_reach_the_parts_and_nothing_else() -> None:
    model = random_model()
    batch = batch_of("llava", SPECS)
    parts = parts_for(model, language_model="all").requires_grad_(True)
    with running(executing, model, FREEZE, Trained(parts=parts)):
        fast = model(**batch.inputs, use_cache=False).logits[batch.types.text_BT]
        fast.square().mean().backward()
    found = {name: weight.grad.clone() for name, weight in parts.named_parameters() if weight.grad is not None}
    parts.zero_grad()
    with running(reference, model, FREEZE, Trained(parts=parts)):
        slow = model(**batch.inputs, use_cache=False).logits[batch.types.text_BT]
        slow.square().mean().backward()
    assert set(found) == set(dict(parts.named_parameters()))
    for name, weight in parts.named_parameters():
        assert weight.grad is not None
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=1e-5 * float(weight.grad.abs().max())), name
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_half_precision_is_as_near_to_the_truth_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    truth, half = random_model(kind), random_model(kind).to(dtype)
    batch = batch_of(kind, SPECS)
    halved = in_dtype(batch, dtype)
    exact_parts = parts_for(truth, noise=0.1)
    learned = Trained(parts=copy.deepcopy(exact_parts).to(dtype))
    with running(reference, truth, FREEZE, Trained(parts=exact_parts)):
        exact = text_logits(truth, batch)
    with running(reference, half, FREEZE, learned):
        slow = (text_logits(half, halved).float() - exact).abs().mean()
    with running(executing, half, FREEZE, learned):
        fast = (text_logits(half, halved).float() - exact).abs().mean()
    assert fast <= 2 * slow


def test_images_whose_features_are_reused_are_an_error() -> None:
    model = random_model()
    first, second = batch_of("llava", [[3, "I", 2]]), batch_of("llava", [[4, "I", 1], [4, "I", 2]], seed=1)
    cache = VisionCache(loaded(model))
    with running(executing, model, FREEZE, Trained(parts=parts_for(model))):
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
    with running(executing, model, FREEZE, Trained(parts=parts_for(model))):
        text_logits(model, other)
        with cache.reusing(first), pytest.raises(ShortVError, match="are not the 4"):
            text_logits(model, first)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = random_model()
    subset = Trained(parts=parts_for(model, (0, 2)))
    for modes, why in {
        FREEZE: "layer 1 is freeze-visual, but these parts have no projector",
        (Mode.FREEZE_VISUAL, Mode.FULL, Mode.FULL, Mode.FULL): "layer 2 is full, but these parts have a projector",
        (Mode.FREEZE_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL, Mode.DROP_VISUAL): "must be full",
    }.items():
        with pytest.raises(Refused, match=why), running(executing, model, modes, subset):
            pass
    for kind in set(KINDS) - set(PROJECTED):
        other = random_model(kind)
        with pytest.raises(Refused, match=f"{FAMILIES[other.config.model_type].label} cannot have"):
            parts_for(other)
