"""What learned parts add to the FLOPs of a plan, against the numbers of the papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shortv.costs import flops_ratio, layer_flops, plan_flops
from shortv.errors import Refused
from shortv.learned.dyvte import exit_flops, measured_exit_ratio
from shortv.learned.registry import plan_flops_ratio
from shortv.learned.saisa import saisa_flops_ratio
from shortv.plan import LearnedParts, Mode, PartsKind, Plan, modes_of_exit
from tests.architectures import architecture

SMALL = architecture(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
T = 64


def test_saisa_with_a_projector_per_layer() -> None:
    """The abstract's -66 % at 64 text tokens; a quarter of what is left is projectors (`reference/saisa.md`, 3)."""
    weights, modes = 1024 * 4096 + 4096**2, [Mode.FREEZE_VISUAL] * 32
    for t, percent in ((64, 33.5), (40, 31.0), (100, 37.0)):
        assert round(100 * saisa_flops_ratio(SMALL, modes, t, 576, projector_weights=weights), 1) == percent
    assert round(100 * saisa_flops_ratio(SMALL, modes, T, 576, projector_weights=0), 1) == 24.5
    assert saisa_flops_ratio(SMALL, modes, T, 0, projector_weights=weights) == 1
    with pytest.raises(Refused, match="at least one token"):
        saisa_flops_ratio(SMALL, modes, 0, 0, projector_weights=weights)


@pytest.mark.parametrize(("first", "ratio"), [(8, 32.3), (15, 52.1), (24, 77.4)])
def test_exits_of_samples_cost_what_their_fixed_plans_do(first: int, ratio: float) -> None:
    for exits in ([first - 1], [first - 3, first + 1], [first - 1] * 3):
        found = measured_exit_ratio(SMALL, [(layer, T, 576) for layer in exits])
        assert found is not None and 100 * found == pytest.approx(ratio, abs=0.051)
    assert exit_flops(SMALL, first - 1, T, 576) == plan_flops(SMALL, modes_of_exit(first - 1, 32), T, 576)


def test_exits_at_the_end_and_none() -> None:
    """The last layer's exit leaves nothing out; samples count with the tokens they have."""
    assert plan_flops(SMALL, modes_of_exit(15, 32), T, 576) / 1e12 == pytest.approx(4.6676, abs=5.1e-5)  # VTW
    assert measured_exit_ratio(SMALL, [(31, T, 576), (32, T, 2880)]) == 1
    assert (measured_exit_ratio(SMALL, [(31, T, 2880), (0, T, 1)]) or 0) > 0.98
    assert measured_exit_ratio(SMALL, []) is None
    with pytest.raises(Refused, match="counted from 0"):
        exit_flops(SMALL, -1, T, 576)


def test_what_parts_cost_is_not_told_by_modes() -> None:
    arch = architecture(num_layers=4)
    rest: dict[str, Any] = {"num_layers": 4, "name": "x", "model": "m", "config_digest": "ab" * 32}
    frozen = Plan.of_layers(Mode.FREEZE_VISUAL, range(4), **rest)
    skipping = Plan.of_layers(Mode.SKIP_ATTENTION, (1, 3), **rest)

    def ratio(plan: Plan, kind: PartsKind, **changes: Any) -> float | None:
        threshold = 0.5 if kind is PartsKind.DYVTE else None
        parts = LearnedParts(kind=kind, path="/p", digest="ef" * 32, threshold=threshold)
        return plan_flops_ratio(dataclasses.replace(plan, parts=parts, **changes), arch, 10, 30)

    own = flops_ratio(arch, frozen.modes, 10, 30)
    assert plan_flops_ratio(frozen, arch, 10, 30) == own
    assert ratio(frozen, PartsKind.SAISA) is None
    assert ratio(frozen, PartsKind.SAISA, flops_ratio=0.4) == 0.4
    wanted = saisa_flops_ratio(arch, frozen.modes, 10, 30, projector_weights=2000)
    assert ratio(frozen, PartsKind.SAISA, flops_ratio=0.4, source={"projector_weights": 2000}) == wanted > own
    assert ratio(frozen, PartsKind.DYVTE, flops_ratio=0.7) == 0.7
    assert ratio(skipping, PartsKind.EAS) is None
    full = 4 * layer_flops(arch, Mode.FULL, 10, 30)
    adapted = (plan_flops(arch, skipping.modes, 10, 30) + 2 * 40 * 500) / full
    assert ratio(skipping, PartsKind.EAS, source={"adapter_weights": 500}) == pytest.approx(adapted)
