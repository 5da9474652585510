"""The prefill bench measures what it says and leaves the model as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shortv.architecture import Architecture
from shortv.bench import measuring
from shortv.bench.prefill import Workload, bench_prefill, roofline_seconds
from shortv.costs import flops_ratio
from shortv.families import decoder_of
from shortv.plan import Mode
from tests.models import LAYERS, batch_of, random_model


@pytest.mark.parametrize("mode", Mode)
def test_with_endless_bandwidth_the_roofline_is_the_flops_ratio(mode: Mode) -> None:
    architecture = Architecture.from_config_dict(random_model().config.to_dict())
    limits = measuring.DeviceLimits(flops=1e9, bandwidth=math.inf)
    work, modes = Workload(batch=3, text_tokens=7, visual_tokens=50), (mode,) * LAYERS
    least, full = (
        roofline_seconds(architecture, plan, work, itemsize=4, limits=limits) for plan in (modes, (Mode.FULL,) * LAYERS)
    )
    assert least / full == pytest.approx(flops_ratio(architecture, modes, 7, 50))


def test_with_endless_flops_the_weights_bound_a_frozen_layer() -> None:
    architecture = Architecture.from_config_dict(random_model().config.to_dict())
    limits = measuring.DeviceLimits(flops=math.inf, bandwidth=1e9)
    work = Workload(batch=1, text_tokens=1, visual_tokens=1)
    weights = 32 * 48 * 2 + 32 * 24 * 2 + 3 * 32 * 48
    seconds = roofline_seconds(architecture, [Mode.FREEZE_VISUAL], work, itemsize=4, limits=limits)
    assert weights * 4 / 1e9 < seconds < 1.2 * weights * 4 / 1e9


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_every_executor_is_timed_and_the_depth_restored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(measuring, "_COPY_BYTES", {"cpu": 2**16})
    model: Any = random_model(kind)
    batch = batch_of(kind, [[3, "I", 2]])
    before = model(**batch.inputs).logits
    modes = (Mode.FULL, Mode.FULL, Mode.FREEZE_VISUAL, Mode.FREEZE_VISUAL)
    work = Workload(batch=2, text_tokens=8, visual_tokens=100)
    seen = {name: batch.inputs[name] for name in ("pixel_values", "image_grid_thw") if name in batch.inputs}
    row = bench_prefill(model, modes, work, case="", pairs=1, pixels=seen)
    assert row.baseline_ms and row.measured_ms and row.ratio == pytest.approx(row.measured_ms / row.baseline_ms)
    assert min(row.ratio, 1) < row.figures["ratio_with_tower"] < max(row.ratio, 1)
    assert all(row.figures[name] > 0 for name in ("tower_ms", "reference_ms", "roofline_ratio", "gflops_per_s"))
    architecture = Architecture.from_config_dict(model.config.to_dict())
    assert row.figures["flops_ratio"] == pytest.approx(flops_ratio(architecture, modes, 8, 100))
    assert len(decoder_of(model).layers) == LAYERS
    assert torch.equal(model(**batch.inputs).logits, before)
