"""SAISA's parts: the size of the paper's projectors, copies to start from, and settings that make sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import LanguageModel, ProjectorSettings
from tests.architectures import architecture
from tests.models import LAYERS, random_model

ALL = tuple(range(LAYERS))


def test_a_projector_of_the_paper_has_20_979_712_parameters() -> None:
    """1024 to 4096 in two layers with biases, 671 M for the 32 layers of LLaVA-1.5-7B."""
    text = hf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32)
    vision = hf.CLIPVisionConfig(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16)
    with torch.device("meta"):
        model: Any = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
        parts = Projectors.build(decoder_of(model), ProjectorSettings(layers=(0, 1)))
    counts = [sum(weight.numel() for weight in own.parameters()) for own in parts.projectors.values()]
    assert counts == [20_979_712, 20_979_712]
    assert parts.projector_weights == 1024 * 4096 + 4096**2
    assert parts.costs(architecture(num_layers=2)) == {"projector_weights": parts.projector_weights}


def test_parts_start_as_copies_in_float32() -> None:
    model = random_model().to(torch.bfloat16)
    decoder = decoder_of(model)
    parts = Projectors.build(decoder, ProjectorSettings(layers=(1, 3), language_model="layers"))
    assert list(parts.projectors) == ["1", "3"]
    for projector in parts.projectors.values():
        for name, weight in projector.named_parameters():
            own = decoder.projector.get_parameter(name)
            assert weight.dtype == torch.float32 and torch.equal(weight, own.float()) and weight.requires_grad
            assert weight.data_ptr() != own.data_ptr()
    held = {owner.get_parameter(name).data_ptr() for owner, name, _ in parts.places(decoder)}
    assert held == {weight.data_ptr() for layer in decoder.layers for weight in layer.parameters()}
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(("choice", "per_layer", "rest"), [("none", 0, 0), ("attention", 4, 0), ("all", 9, 3)])
def test_how_much_of_the_language_model_is_held(choice: LanguageModel, per_layer: int, rest: int) -> None:
    model = random_model()
    parts = Projectors.build(decoder_of(model), ProjectorSettings(layers=ALL, language_model=choice))
    names = [name for name, _ in parts.language_model.named_parameters()]
    assert len(names) == LAYERS * per_layer + rest
    assert len([name for name in names if not name.startswith("layers.")]) == rest


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(Refused, match="layer 4 has a projector, but the model has 4 layers"):
        Projectors.build(decoder_of(random_model()), ProjectorSettings(layers=(0, 4)))
