"""Campaigns without a model: a runner that scores by the layers of a plan, and what its campaigns print and write."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console

from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.evals.scoring import MetricRow, Scored, ScoredSample
from shortv.plan import Mode, Plan
from shortv.spec import ModelSpec
from shortv.workers.campaign.cells import CellResult, RunCell, TaskFacts
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.spec import CampaignSpec
from tests.architectures import architecture
from tests.reports import runs

TIMES = {"started", "finished", "wall_seconds"}
LAYERS = 8
ARCH = architecture(num_layers=LAYERS)


def campaign_spec(output: Path, **changes: Any) -> CampaignSpec:
    """Settings of a campaign with six plans on one model and one task."""
    plans = ("random:0..2@3", "first@3", "last@3")
    return CampaignSpec(
        **{"models": ("tiny",), "output_path": str(output), "plans": plans, "tasks": ("shapes",)} | changes
    )


def campaign(spec: CampaignSpec, runner: FakeRunner | None = None, status: int = 0, page: bool = False) -> str:
    """Run the campaign, by default without its page, and return its output."""
    console = Console(file=io.StringIO(), width=160)
    with nullcontext() if page else patch("reports.page.write_page"):
        assert run_campaign(spec, runner=runner or FakeRunner(), console=console) == status  # type: ignore[arg-type]
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def last_table(output: str) -> str:
    """The tables at the end of what a campaign printed."""
    return output[output.index("tiny on shapes") :]


def tables(output: Path) -> Mapping[str, list[dict[str, Any]]]:
    """All tables of a campaign, and its answers in one order, without times of the clock."""
    folder = Folder(output)
    found = {name: folder.read_table(name).to_pylist() for name in TABLES}
    answers = folder.read_tables("answers").to_pylist()
    found["answers"] = sorted(answers, key=lambda row: (row["cell"], row["sample_id"]))
    return {
        name: [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for name, rows in found.items()
    }


@dataclasses.dataclass(kw_only=True)
class FakeRunner:
    """Returns a wrong answer the more often, the earlier the layers that a plan changes.

    `before` is called before every cell with the plan's name and the task; the samples in `failing` fail.
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

    @property
    def loader(self) -> FakeRunner:
        return self

    def pin(self, model: ModelSpec) -> ModelSpec:
        return model.model_copy(update={"revision": self.commits.get(model.revision, model.revision)})

    def describe(self, model: ModelSpec) -> Architecture:
        if model.name == "nothing":
            raise Refused("nothing is not a model")
        return architecture(num_layers=int(model.name[1:])) if model.name[0] == "L" else ARCH

    def task(self, name: str, spec: CampaignSpec) -> TaskFacts:
        if name == "nothing":
            raise Refused("lmms-eval knows no task 'nothing'")
        return TaskFacts(name, hashlib.sha256(name.encode()).hexdigest(), self.samples, "exact_match")

    @contextmanager
    def open(self, model: ModelSpec, plans: Sequence[Plan], spec: CampaignSpec) -> Iterator[RunCell]:
        if self.broken:
            raise ShortVError("no replica started")
        self.revisions.append(model.revision)
        self.opened.append(f"{model.name}: {', '.join(plan.name for plan in plans)}")

        def run_cell(plan: Plan | None, task: str) -> CellResult:
            name = plan.name if plan else "full"
            assert plan in (None, *plans)
            self.before(name, task)
            self.ran.append(f"{model.name} {name} {task}")
            samples = [self._sample(model.name, plan, index) for index in range(self.samples)]
            if self.reverse:
                samples.reverse()
            scores = [sample.scores["exact_match"] for sample in samples if not sample.error]
            mean = float(np.nanmean(scores)) if scores else float("nan")
            metrics = [MetricRow("exact_match", "none", mean, float("nan"), len(scores))]
            if self.unscored:
                metrics = []
            scored = Scored(samples=samples, metrics=metrics, problem="no judge" if self.unscored else None)
            return CellResult(scored, 2.0, 1)

        yield run_cell

    def _sample(self, model: str, plan: Plan | None, index: int) -> ScoredSample:
        sample_id = f"s{index}"
        if sample_id in self.failing:
            return ScoredSample(sample_id=sample_id, prediction=None, target="red", error="truncated JPEG")
        changed = [layer for layer, mode in enumerate(plan.modes) if mode is not Mode.FULL] if plan else []
        harm = sum(LAYERS - layer for layer in changed) / 25
        luck = int(hashlib.sha256(f"{model} {sample_id} {changed}".encode()).hexdigest()[:8], 16) / 2**32
        right = luck > 0.1 + harm / 2
        score = float("nan") if self.nan and index % 2 else float(right)
        return ScoredSample(
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
    """A finished sweep folder in which deeper layers have a smaller LC."""
    sizes = {"config_digest": arch.config_digest, "details": {"architecture": dataclasses.asdict(arch)}}
    runs.make_sweep(path, layers=arch.num_layers, modes=[Mode.FREEZE_VISUAL], model="tiny", revision=None, **sizes)
    return path
