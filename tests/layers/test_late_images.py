"""An image that arrives after a sequence's first forward is refused: no plan may treat its rows as text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shortv.errors import ShortVError
from shortv.families import Batch, decoder_of
from shortv.layers.apply import executing
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import ProjectorSettings
from shortv.plan import Mode
from tests.models import LAYERS, Spec, batch_of, random_model
from tests.parts import Trained, running

FULL = (Mode.FULL,) * LAYERS
FREEZE = (Mode.FREEZE_VISUAL,) * LAYERS
LATE: Spec = [6, "I", 2]


def first_turn(model: nn.Module, batch: Batch) -> DynamicCache:
    cache: DynamicCache = model(input_ids=batch.inputs["input_ids"][:, :4], use_cache=True).past_key_values
    return cache


def pixels(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**later(batch), past_key_values=first_turn(model, batch)).logits
    return logits


def features(model: Any, batch: Batch) -> Tensor:
    inputs = later(batch)
    given = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}
    encoded = {"image": model.base_model.get_image_features(**given, return_dict=True)}
    grid = {name: value for name, value in given.items() if name == "image_grid_thw"}
    logits: Tensor = model(
        **inputs, **grid, mm_encoder_outputs=encoded, past_key_values=first_turn(model, batch)
    ).logits
    return logits


def generated(model: Any, batch: Batch, **options: Any) -> Tensor:
    options = options or {"past_key_values": first_turn(model, batch)}
    fixed: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    logits: Tensor = model.generate(**batch.inputs, **options, **fixed, return_dict_in_generate=True).logits[0]
    return logits


def later(batch: Batch) -> dict[str, Any]:
    """The inputs of a batch without its first four tokens, which are text."""
    inputs = dict(batch.inputs)
    for name in ("input_ids", "position_ids", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, 4:]
    if "position_ids" not in inputs:  # Qwen's models would compute positions, and expect the whole prompt for it
        inputs["position_ids"] = torch.arange(4, batch.types.text_BT.shape[1]).expand(3, 1, -1)
    return inputs


ROUTES: list[Callable[[Any, Batch], Tensor]] = [pixels, features, generated, partial(generated, prefill_chunk_size=4)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["llava", "llava-onevision", "qwen2.5-vl", "gemma3"])
def test_a_late_image_is_refused_by_a_plan_and_passes_a_full_one(
    kind: str, route: Callable[[Any, Batch], Tensor]
) -> None:
    model, batch = random_model(kind), batch_of(kind, [LATE])
    with torch.inference_mode():
        expected = route(model, batch)
        with executing(model, FULL):
            assert torch.equal(route(model, batch), expected)
        with executing(model, FREEZE), pytest.raises(ShortVError, match="image arrives after"):
            route(model, batch)


@pytest.mark.parametrize("route", ROUTES)
def test_a_late_image_is_refused_under_learned_parts(route: Callable[[Any, Batch], Tensor]) -> None:
    model, batch = random_model(), batch_of("llava", [LATE])
    decoder = decoder_of(model)
    projectors = Projectors.build(decoder, ProjectorSettings(layers=tuple(range(LAYERS)), language_model="none"))
    routers = ExitRouters.build(decoder, RouterSettings(width=2))
    for modes, learned in ((FREEZE, Trained(parts=projectors)), (FULL, Trained(parts=routers, threshold=0.5))):
        with (
            torch.inference_mode(),
            running(executing, model, modes, learned),
            pytest.raises(ShortVError, match="image arrives after"),
        ):
            route(model, batch)
