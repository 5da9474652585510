"""How fast plans are beside each other: the same batch under each of them, in rounds, on a synchronised clock.

Nothing here depends on the order of plans, on what ran before, or on caches: images are preprocessed and seen by the
tower beforehand, each plan has a run that does not count, and ratios are taken within rounds, whose order rotates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, stdev

import torch

from shortv.families import LoadedModel
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.layers.progress import LearnedRun
from shortv.plan import Mode
from shortv.request import FULL_MODEL, PlanSpeed
from shortv.workers.serving.forward import CachedForward
from shortv.workers.serving.preparing import Prepared

_LEAST_ROUNDS, _TOWER_RUNS = 5, 3
_DECODE_STEPS, _DECODE_ROUNDS = 4, 5
_STDERR = 0.005
# The standard error of a median is so much larger than that of a mean, for values that are normally distributed.
_OF_MEDIAN = math.sqrt(math.pi / 2)


@dataclass(slots=True, kw_only=True, eq=False)
class MeasuredPlan:
    """What a plan runs under, the batch that it runs on, and what each round took."""

    modes: tuple[Mode, ...]
    run: LearnedRun | None
    prepared: Sequence[Prepared]
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    peak_bytes: int | None = None


def measure_plans(loaded: LoadedModel, plans: Mapping[str, MeasuredPlan], *, seconds: float) -> tuple[PlanSpeed, ...]:
    """Measure plans, the full model among them, in this thread; the model must be under no plan.

    It ends when the standard error of every ratio is below 0.5 %, or after `seconds`, with five rounds at least.
    """
    until = time.perf_counter() + seconds
    vision = VisionCache(loaded)
    for plan in plans.values():
        _run(loaded, vision, plan, steps=_DECODE_STEPS)
        plan.prefill_ms.clear()
        plan.decode_ms.clear()
    names, rounds = list(plans), 0
    while rounds < _LEAST_ROUNDS or (time.perf_counter() < until and _uncertain(plans)):
        start = rounds % len(names)
        for name in names[start:] + names[:start]:
            _run(loaded, vision, plans[name], steps=_DECODE_STEPS if rounds < _DECODE_ROUNDS else 0)
        rounds += 1
    towers: dict[int, float] = {}
    for plan in plans.values():
        if id(plan.prepared) not in towers:
            towers[id(plan.prepared)] = _tower_ms(loaded, plans[FULL_MODEL], plan.prepared)
    return tuple(_speed(name, plan, plans[FULL_MODEL], towers[id(plan.prepared)]) for name, plan in plans.items())


def _run(loaded: LoadedModel, vision: VisionCache, plan: MeasuredPlan, *, steps: int) -> None:
    """Prefill the batch and decode some tokens."""
    _reset_peak(loaded)
    with executing(loaded.model, plan.modes, plan.run):
        forward = CachedForward(loaded, vision, [one.encoded for one in plan.prepared], plan.run)
        plan.prefill_ms.append(forward.prefill_ms)
        plan.kv_bytes = forward.kv_bytes
        started = time.perf_counter()
        for _ in range(steps):
            forward.step(forward.logits_BV.argmax(-1).tolist())
        loaded.synchronize()
        if steps:
            plan.decode_ms.append(1e3 * (time.perf_counter() - started) / steps)
    plan.peak_bytes = _peak(loaded)


def _tower_ms(loaded: LoadedModel, full: MeasuredPlan, prepared: Sequence[Prepared]) -> float:
    """Return the time of the vision tower on a batch, the first run left out."""
    took = []
    for _ in range(1 + _TOWER_RUNS):
        with executing(loaded.model, full.modes):
            vision = VisionCache(loaded, max_bytes=0)
            took.append(CachedForward(loaded, vision, [one.encoded for one in prepared]).tower.now_ms)
    return median(took[1:])


def _ratios(plan: MeasuredPlan, full: MeasuredPlan) -> list[float]:
    return [own / base for own, base in zip(plan.prefill_ms, full.prefill_ms, strict=True)]


def _stderr(ratios: Sequence[float]) -> float:
    return _OF_MEDIAN * stdev(ratios) / math.sqrt(len(ratios))


def _uncertain(plans: Mapping[str, MeasuredPlan]) -> bool:
    return any(_stderr(_ratios(plan, plans[FULL_MODEL])) >= _STDERR for plan in plans.values())


def _speed(name: str, plan: MeasuredPlan, full: MeasuredPlan, tower_ms: float) -> PlanSpeed:
    ratios = _ratios(plan, full)
    return PlanSpeed(
        plan=name,
        batch=len(plan.prepared),
        rounds=len(ratios),
        preprocess_ms=sum(one.preprocess_ms for one in plan.prepared),
        vision_ms=tower_ms,
        prefill_ms=median(plan.prefill_ms),
        prefill_ratio=median(ratios),
        prefill_ratio_stderr=_stderr(ratios),
        decode_ms_per_token=median(plan.decode_ms),
        kv_bytes=plan.kv_bytes / len(plan.prepared),
        peak_bytes=plan.peak_bytes,
    )


def _reset_peak(loaded: LoadedModel) -> None:
    for device in loaded.cuda_devices:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(loaded: LoadedModel) -> int | None:
    peaks = [torch.cuda.max_memory_allocated(device) for device in loaded.cuda_devices]
    return sum(peaks) if peaks else None
