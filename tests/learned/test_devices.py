"""Learned parts on a model that is spread over two devices; the second is `meta`, which has no values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import shortv
from shortv.families import decoder_of
from shortv.learned.base import Parts
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.dyvte.run import exit_layers
from shortv.learned.eas.parts import Adapters
from shortv.learned.eas.recipe import EasSettings
from shortv.learned.saisa.parts import Projectors
from shortv.learned.saisa.recipe import ProjectorSettings
from shortv.plan import Mode, PartsKind, Plan
from tests.models import LAYERS, Spec, batch_of, loaded, random_model
from tests.parts import save_named, shuffled

SPECS: list[Spec] = [[3, "I", 2], ["I", 5, "I", 1], [1, "I", 9], [6]]
NEAR = 2
"""Layers on the first device."""
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")


def routers(model: Any) -> Parts:
    """Routers that let some samples go after layer 0 and all others after layer 1: `meta` can decide nothing."""
    torch.manual_seed(2)
    parts = ExitRouters.build(decoder_of(model), RouterSettings(width=16))
    for router in parts.routers[1:]:
        torch.nn.init.zeros_(router.outer.weight)  # type: ignore[arg-type, union-attr]
    return parts


def plan_for(model: Any, kind: PartsKind, folder: Path) -> Plan:
    if kind is PartsKind.DYVTE:
        parts, modes = routers(model), (Mode.FULL,) * LAYERS
    elif kind is PartsKind.EAS:
        settings = EasSettings(kept=(0, 2), skipped=(1, 3), kept_rank=4, pia_rank=6)
        parts, modes = shuffled(Adapters.build(decoder_of(model), settings)), settings.modes(LAYERS)
    else:
        parts = Projectors.build(decoder_of(model), ProjectorSettings(layers=(0, 1, 3), language_model="all"))
        modes = parts.settings.modes(LAYERS)
    digest = loaded(model).architecture.config_digest
    named = save_named(folder, loaded(model), parts, threshold=0.5 if kind is PartsKind.DYVTE else None)
    return Plan(name="learned", model="random", config_digest=digest, num_layers=LAYERS, modes=modes, parts=named)


def spread(model: Any) -> Any:
    """The same model with its later layers, norm and head on the second device."""
    decoder = decoder_of(model)
    for module in (*decoder.layers[NEAR:], decoder.norm, decoder.head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", PartsKind)
def test_a_plan_runs_across_devices_as_on_one(kind: PartsKind, tmp_path: Path) -> None:
    model, batch = random_model(), batch_of("llava", SPECS)
    plan = plan_for(model, kind, tmp_path)
    token = {"input_ids": torch.full((4, 1), 5), "position_ids": batch.inputs["position_ids"][:, -1:] + 1}
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    found = []
    for place in (model, spread(random_model())):
        with torch.inference_mode(), shortv.apply(place, plan):
            output = place(**batch.inputs, use_cache=True)
            exits, cache = exit_layers(output.past_key_values), output.past_key_values
            decoded = place(**token, attention_mask=mask, past_key_values=cache, output_hidden_states=True)
            whole = place(**batch.inputs, use_cache=True, output_hidden_states=True)
        found.append((exits, [*decoded.hidden_states[: NEAR + 1], *whole.hidden_states[: NEAR + 1]]))
        assert output.logits.shape == (4, batch.types.text_BT.shape[1], 96) and decoded.logits.shape == (4, 1, 96)
    assert output.logits.device.type == decoded.logits.device.type == "meta"
    assert found[0][0] == found[1][0] and (kind is not PartsKind.DYVTE or len(set(found[0][0] or ())) == 3)
    for expected, state in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(state, expected)
