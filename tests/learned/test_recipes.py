"""Settings and recipes that cannot be meant are refused with the name of the setting."""

from __future__ import annotations

from typing import Any

import pytest

from shortv.errors import Refused
from shortv.learned.dyvte.recipe import DyvteRecipe, RouterSettings
from shortv.learned.eas.recipe import EasRecipe, EasSettings
from shortv.learned.saisa.recipe import ProjectorSettings, SaisaRecipe
from shortv.spec import validate

CASES: list[tuple[Any, dict[str, Any], str]] = [
    (RouterSettings, {"width": 10**12}, "width is 1000000000000"),
    (DyvteRecipe, {"steps": 0}, "--steps is 0"),
    (DyvteRecipe, {"learning_rate": float("nan")}, "--learning-rate is nan"),
    (DyvteRecipe, {"learning_rate": 2.0}, "--learning-rate is 2"),
    (DyvteRecipe, {"agreement": 1.0}, "--agreement is 1"),
    (DyvteRecipe, {"ce_slack": float("inf")}, "--ce-slack is inf"),
    (DyvteRecipe, {"targets": "none"}, "--targets is 'none'"),
    (DyvteRecipe, {"depth": 3}, "unknown setting 'depth'"),
    (SaisaRecipe, {"batch_size": 0}, "--batch-size is 0"),
    (SaisaRecipe, {"projector_steps": 0, "joint_steps": 0}, "0 steps"),
    (SaisaRecipe, {"projector_rate": float("nan")}, "--stage-1-learning-rate is nan"),
    (SaisaRecipe, {"joint_rate": 0.0}, "--learning-rate is 0"),
    *((ProjectorSettings, {"layers": layers}, "--layers") for layers in ([], [2, 1], [0, 0], [-1], ["0"], 3)),
    (EasRecipe, {"layers": (1, 2)}, "make it 'given'"),
    (EasRecipe, {"choice": "given", "layers": (1, 1)}, "not distinct"),
    (EasRecipe, {"choice": "given", "layers": (1, 2), "skip": 3}, "leave skip out"),
    (EasRecipe, {"search_steps": 9, "steps": 9}, "fewer search steps"),
    (EasRecipe, {"held_out": 1.0}, "--held-out is 1"),
    (EasRecipe, {"pia_rank": 7}, "pia_rank 7 is not a multiple of 2"),
    (EasSettings, {"kept": (0, 0), "skipped": ()}, "kept layers are not distinct"),
    (EasSettings, {"kept": (0,), "skipped": (), "pia_rank": 10**12}, "--pia-rank is 1000000000000"),
]


@pytest.mark.parametrize(("spec", "values", "message"), CASES)
def test_what_cannot_be_meant_is_refused(spec: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        validate(spec, values)
