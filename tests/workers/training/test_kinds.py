"""What a system cannot be trained for is refused from the model's configuration alone, and costs no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shortv.errors import Refused
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.registry import SYSTEMS
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.plan import PartsKind
from shortv.spec import ModelSpec
from shortv.workers.training.spec import check_trainable, outline
from tests.models import LAYERS, random_model

SAISA, DYVTE, EAS = SaisaRecipe(), DyvteRecipe(), EasRecipe()
RECIPES = {SaisaRecipe: PartsKind.SAISA, DyvteRecipe: PartsKind.DYVTE, EasRecipe: PartsKind.EAS}


def check(family: str, recipe: Any, place: Path) -> None:
    """Check a training on a folder that holds a configuration and nothing else."""
    random_model(family).config.save_pretrained(place)
    kind, spec = RECIPES[type(recipe)], ModelSpec(name=str(place))
    check_trainable(SYSTEMS[kind], spec, recipe, (0.5,))


@pytest.mark.parametrize(
    ("family", "recipe", "why"),
    [
        ("llava-next", SAISA, "layers of LLaVA-NeXT cannot have projectors of their own"),
        ("qwen3-vl", SAISA, "layers of Qwen3-VL cannot have projectors of their own"),
        ("llava", SaisaRecipe(layers=(LAYERS,)), f"the model has {LAYERS} layers"),
        ("qwen3-vl", DYVTE, "DyVTE does not run on Qwen3-VL"),
        ("gemma3", DYVTE, "DyVTE does not run on this Gemma 3 model"),
        ("gemma3", EAS, "EAS is not defined for Gemma 3"),
        ("llava", EasRecipe(choice="given", layers=(1, LAYERS)), f"layer {LAYERS} does not exist"),
        ("llava", EasRecipe(skip=LAYERS), f"a search for {LAYERS} of {LAYERS} layers has no choice"),
        ("llava", EasRecipe(groups=3, kept_rank=3, pia_rank=3), "3 groups do not divide the model's width of 32"),
    ],
)
def test_what_cannot_be_trained_is_refused_without_weights(family: str, recipe: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=why):
        check(family, recipe, tmp_path)


@pytest.mark.parametrize("recipe", [SAISA, DYVTE, EAS], ids=list(RECIPES.values()))
@pytest.mark.parametrize("family", ["llava-mistral", "qwen2.5-vl", "internvl", "idefics3"])
def test_what_can_be_trained_is_not(family: str, recipe: Any, tmp_path: Path) -> None:
    check(family, recipe, tmp_path)


def test_a_configuration_that_no_model_can_be_built_from_is_refused(tmp_path: Path) -> None:
    config = random_model("llava").config
    config.text_config.hidden_act = "none such"
    config.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="a model cannot be built from the configuration of"):
        outline(ModelSpec(name=str(tmp_path)))
