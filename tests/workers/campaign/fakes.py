"""A runner without a model: answers from names, and every way in which a real one fails."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reports.manifest import Manifest
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.evals.scoring import MetricRow, Sample
from shortv.plan import Mode, Plan
from shortv.records import KlDirection, LcRecord, UsedSample
from shortv.sweep.ranking import layer_statistics
from shortv.workers.campaign.cells import CellResult, RunCell, TaskFacts
from shortv.workers.campaign.spec import CampaignSpec
from tests.architectures import architecture

LAYERS = 8
ARCH = architecture(num_layers=LAYERS)


def recipe(output: Path, **changes: Any) -> CampaignSpec:
    plans = ("random:0..2@3", "first@3", "last@3")
    return CampaignSpec(
        **{"models": ("tiny",), "output_path": str(output), "plans": plans, "tasks": ("shapes",)} | changes
    )


@dataclasses.dataclass(kw_only=True)
class FakeRunner:
    """Gets a question wrong the more often, the earlier the layers that a plan changes.

    `before` is called before every cell with the plan's name and the task; `failing` names samples that fail.
    """

    samples: int = 60
    failing: frozenset[str] = frozenset()
    before: Callable[[str, str], None] = lambda plan, task: None
    reverse: bool = False
    broken: bool = False
    unscored: bool = False
    nan: bool = False
    commits: dict[str | None, str] = dataclasses.field(default_factory=dict)
    ran: list[str] = dataclasses.field(default_factory=list)
    revisions: list[str | None] = dataclasses.field(default_factory=list)
    opened: list[str] = dataclasses.field(default_factory=list)

    def pin(self, model: str, recipe: CampaignSpec) -> str | None:
        return self.commits.get(recipe.revision, recipe.revision)

    def describe(self, model: str, recipe: CampaignSpec) -> Architecture:
        if model == "nothing":
            raise Refused("nothing is no model")
        return architecture(num_layers=int(model[1:])) if model[0] == "L" else ARCH

    def task(self, name: str, recipe: CampaignSpec) -> TaskFacts:
        if name == "nothing":
            raise Refused("lmms-eval knows no task 'nothing'")
        return TaskFacts(name, hashlib.sha256(name.encode()).hexdigest(), self.samples, "exact_match")

    @contextmanager
    def open(self, model: str, plans: Sequence[Plan], recipe: CampaignSpec) -> Iterator[RunCell]:
        if self.broken:
            raise ShortVError("no replica started")
        self.revisions.append(recipe.revision)
        self.opened.append(f"{model}: {', '.join(plan.name for plan in plans)}")

        def run_cell(plan: Plan | None, task: str) -> CellResult:
            name = plan.name if plan else "full"
            assert plan in (None, *plans)
            self.before(name, task)
            self.ran.append(f"{model} {name} {task}")
            samples = [self._sample(model, plan, index) for index in range(self.samples)]
            if self.reverse:
                samples.reverse()
            scores = [sample.scores["exact_match"] for sample in samples if not sample.error]
            mean = float(np.nanmean(scores)) if scores else float("nan")
            metrics = [MetricRow("exact_match", "none", mean, float("nan"), len(scores))]
            if self.unscored:
                return CellResult(samples=samples, metrics=[], problem="no judge")
            return CellResult(samples=samples, metrics=metrics, seconds=2.0, replicas=1)

        yield run_cell

    def _sample(self, model: str, plan: Plan | None, index: int) -> Sample:
        sample_id = f"s{index}"
        if sample_id in self.failing:
            return Sample(sample_id=sample_id, prediction=None, target="red", error="truncated JPEG")
        changed = [layer for layer, mode in enumerate(plan.modes) if mode is not Mode.FULL] if plan else []
        harm = sum(LAYERS - layer for layer in changed) / 25
        luck = int(hashlib.sha256(f"{model} {sample_id} {changed}".encode()).hexdigest()[:8], 16) / 2**32
        right = luck > 0.1 + harm / 2
        score = float("nan") if self.nan and index % 2 else float(right)
        return Sample(
            sample_id=sample_id,
            prediction="red" if right else "blue",
            target="red",
            scores={"exact_match": score, **({"exact_match_even": score} if index % 2 == 0 else {})},
            latency_ms=10.0 + index,
            queue_ms=1.0,
            prefill_ms=8.0 - len(changed),
            decode_ms=4.0,
            prompt_tokens=40,
            visual_tokens=30,
            completion_tokens=2,
        )


def make_sweep(path: Path, arch: Architecture = ARCH) -> Path:
    """A finished sweep folder that ranks the last layer first: the deeper, the less a layer matters."""
    folder = Folder(path)
    ids = [f"c{index}" for index in range(4)]
    kl_SL = np.arange(arch.num_layers, 0, -1) / 10 * (1 + 0.01 * np.arange(4)[:, None])
    mode, direction = Mode.FREEZE_VISUAL, KlDirection.FULL_ABLATED
    used = [UsedSample(sample_id=name, dataset=None, prompt="?", answer=None, n_text=10, n_visual=30) for name in ids]
    rows = [
        LcRecord(sample_id=name, mode=mode, layer=layer, kl_full_ablated=kl, kl_ablated_full=kl, top1_changed=False)
        for name, kl_L in zip(ids, kl_SL.tolist(), strict=True)
        for layer, kl in enumerate(kl_L)
    ]
    statistics = layer_statistics(kl_SL, mode=mode, kl_direction=direction, noise_floor=1e-9, seed=0, resamples=20)
    folder.write_table("samples", used)
    folder.write_table("lc_samples/part-00000", rows)
    folder.write_table("lc_layers", statistics)
    Manifest(
        state="complete",  # type: ignore[arg-type]
        arguments={},
        arguments_digest="a" * 64,
        versions={},
        model="tiny",
        revision=None,
        config_digest=arch.config_digest,
        num_layers=arch.num_layers,
        modes=(mode.value,),
        kl_direction=direction.value,
        calibration_ids=tuple(ids),
        calibration_digest="b" * 64,
        seed=0,
        noise_floor=1e-9,
        started="2026-01-01T00:00:00+00:00",
        details={"architecture": dataclasses.asdict(arch)},
    ).save(folder)
    return path
