"""Campaigns without Ray or a model: workers that answer by the layers of a plan, and what campaigns print and write."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from reports.answers import Answers
from reports.schemas import schema_of
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.evals.judging import Judge
from shortv.evals.scoring import Label, MetricRow, Metrics, ScoredSample
from shortv.plan import Mode, Plan
from shortv.request import FULL_MODEL, EngineClock, PlanSpeed
from shortv.spec import ModelSpec
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.producer import UnitResult, answer_row, result_of
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import TaskSource, Unit
from tests.architectures import architecture
from tests.reports import runs

OF_A_RUN = {"idle_share", "replicas"}
LAYERS = 8
ARCH = architecture(num_layers=LAYERS)


def campaign_spec(output: Path, **changes: Any) -> CampaignSpec:
    """Settings of a campaign with six plans on one model and one task."""
    plans = ("random:0..2@3", "first@3", "last@3")
    return CampaignSpec(
        **{"models": ("tiny",), "output_path": str(output), "plans": plans, "tasks": ("shapes",)} | changes
    )


def campaign(spec: CampaignSpec, workers: FakeWorkers | None = None, status: int = 0, page: bool = False) -> str:
    """Run the campaign, by default without its page, and return its output."""
    console = Console(file=io.StringIO(), width=160)
    with nullcontext() if page else patch("reports.page.write_page"):
        assert run_campaign(spec, workers=workers or FakeWorkers(), console=console) == status  # type: ignore[arg-type]
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def last_table(output: str) -> str:
    """The tables at the end of what a campaign printed."""
    return output[output.index("tiny on shapes") :]


def tables(output: Path) -> Mapping[str, list[dict[str, Any]]]:
    """All tables of a campaign without what only tells of a run, and its latest answers in one order."""
    folder = Folder(output)
    found = {name: folder.read_table(name).to_pylist() for name in TABLES}
    found["speed"] = [{name: value for name, value in row.items() if name not in OF_A_RUN} for row in found["speed"]]
    parts = Answers(folder).scan(schema_of("answers").names)
    answers = [row for part in parts for row in part.to_pylist()]
    found["answers"] = sorted(answers, key=lambda row: (row["cell"], row["doc"]))
    return found


@dataclasses.dataclass(kw_only=True)
class FakeTask:
    """A task whose metric is the mean of its scores."""

    name: str
    num_docs: int
    unscored: bool = False
    edited: frozenset[int] = frozenset()
    main_metric: str = "exact_match"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def document_digests(self) -> NDArray[np.int64]:
        return np.array([doc + 1000 * (doc in self.edited) for doc in range(self.num_docs)], dtype=np.int64)

    def label(self, doc: int) -> Label:
        return Label(f"s{doc}", "red", None)

    def aggregate(self, values: Iterable[str], *, judge: Judge) -> Metrics:
        if self.unscored:
            return Metrics((), "no judge")
        scores = [float(value) for value in values]
        mean = float(np.nanmean(scores)) if scores else float("nan")
        return Metrics((MetricRow("exact_match", "none", mean, float("nan"), len(scores)),))


@dataclasses.dataclass(kw_only=True)
class FakeWorkers:
    """Answers wrong the more often, the earlier the layers that a plan changes.

    `before` is called with every unit before it is answered; the documents in `failing` fail. `asked` holds every
    document with the plan and the task that it was answered under, `units` how many documents and plans each unit had.
    """

    samples: int = 60
    failing: frozenset[int] = frozenset()
    before: Callable[[Unit], None] = lambda unit: None
    reverse: bool = False
    broken: bool = False
    unscored: bool = False
    nan: bool = False
    edited: frozenset[int] = frozenset()
    commits: dict[str | None, str] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str, str, int]] = dataclasses.field(default_factory=list)
    units: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    revisions: list[str | None] = dataclasses.field(default_factory=list)
    started: list[str] = dataclasses.field(default_factory=list)
    measured: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    @property
    def loader(self) -> FakeWorkers:
        return self

    @property
    def ran(self) -> list[str]:
        """The cells that were asked for at least one document, in order."""
        return list(dict.fromkeys(f"{model} {plan} {task}" for model, plan, task, _ in self.asked))

    def pin(self, model: ModelSpec) -> ModelSpec:
        return model.model_copy(update={"revision": self.commits.get(model.revision, model.revision)})

    def describe(self, model: ModelSpec) -> Architecture:
        if model.name == "nothing":
            raise Refused("nothing is not a model")
        return architecture(num_layers=int(model.name[1:])) if model.name[0] == "L" else ARCH

    def task(self, name: str, spec: CampaignSpec) -> FakeTask:
        if name == "nothing":
            raise Refused("lmms-eval knows no task 'nothing'")
        count = self.samples if spec.limit is None else min(self.samples, int(spec.limit))
        return FakeTask(name=name, num_docs=count, unscored=self.unscored, edited=self.edited)

    def sample(self, model: str, plan: Plan | None, doc: int) -> ScoredSample:
        """What the fake model answers."""
        if doc in self.failing:
            return ScoredSample(doc=doc, sample_id=f"s{doc}", prediction=None, target="red", error="truncated JPEG")
        changed = [layer for layer, mode in enumerate(plan.modes) if mode is not Mode.FULL] if plan else []
        share = (plan and plan.downsample) or 1.0
        harm = sum(LAYERS - layer for layer in changed) / 25 + 1 - share
        luck = int(hashlib.sha256(f"{model} s{doc} {changed}".encode()).hexdigest()[:8], 16) / 2**32
        right = luck > 0.1 + harm / 2
        score = float("nan") if self.nan and doc % 2 else float(right)
        return ScoredSample(
            doc=doc,
            sample_id=f"s{doc}",
            prediction="red" if right else "blue",
            target="red",
            scores={"exact_match": score, **({"exact_match_even": score} if doc % 2 == 0 else {})},
            latency_ms=10.0 + doc,
            queue_ms=1.0,
            preprocess_ms=2.0,
            vision_ms=3.0,
            prefill_ms=8.0 - len(changed),
            prefill_batch=16,
            decode_ms=4.0,
            busy_ms=40.0,
            prompt_tokens=10 + int(30 * share),
            visual_tokens=int(30 * share),
            completion_tokens=2,
            values=str(score),
        )

    @contextmanager
    def open(self, spec: CampaignSpec, tasks: Sequence[FakeTask]) -> Iterator[FakePool]:
        yield FakePool(self, tasks)


class FakePool:
    """What a campaign does with its workers, without any."""

    def __init__(self, workers: FakeWorkers, tasks: Sequence[FakeTask]) -> None:
        self.sources = {task.name: TaskSource(name=task.name, digest=task.digest, settings={}) for task in tasks}
        self._workers = workers
        self._plans: dict[str, dict[str, Plan]] = {}

    async def start(self, model: ModelSpec, plans: Sequence[Plan]) -> str:
        if self._workers.broken:
            raise ShortVError("no replica started")
        self._workers.revisions.append(model.revision)
        self._workers.started.append(f"{model.name}: {', '.join(plan.name for plan in plans)}")
        self._plans[model.name] = {plan.name: plan for plan in plans}
        return model.name

    async def stop(self, app: str) -> None:
        del self._plans[app]

    async def watch(self) -> None:
        pass

    async def enter(self) -> None:
        pass

    async def leave(self) -> None:
        pass

    async def run(self, unit: Unit) -> UnitResult:
        workers, plans = self._workers, self._plans[unit.app]
        workers.before(unit)
        workers.units.append((len(unit.docs), len(unit.cells)))
        rows = []
        for cell in unit.cells:
            assert (cell.served == FULL_MODEL) == (cell.plan == "full") and cell.plan in ("full", *plans)
            for doc, digest in zip(unit.docs, unit.digests, strict=True):
                workers.asked.append((cell.model, cell.plan, cell.task, doc))
                rows.append(answer_row(cell, digest, workers.sample(cell.model, plans.get(cell.plan), doc)))
        clock = EngineClock(replica="r", busy_s=3.0 * len(workers.units), idle_s=1.0 * len(workers.units))
        return result_of(rows[::-1] if workers.reverse else rows, {"r": clock})

    async def measure(self, unit: Unit) -> list[PlanSpeed]:
        self._workers.measured.append(tuple(cell.plan for cell in unit.cells))
        plans = self._plans[unit.app]
        return [
            PlanSpeed(
                **{"plan": cell.served, "batch": len(unit.docs), "rounds": 3, "kv_bytes": 64.0, "peak_bytes": None},
                **{"preprocess_ms": 2.0, "vision_ms": 3.0, "prefill_ratio_stderr": 0.001, "decode_ms_per_token": 1.0},
                prefill_ms=8.0 - changed_layers(plans.get(cell.plan)),
                prefill_ratio=1 - changed_layers(plans.get(cell.plan)) / 8,
            )
            for cell in unit.cells
        ]

    async def pictures(self, task: TaskSource, docs: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "task": task.name,
                "doc": doc,
                "sample_id": f"s{doc}",
                "question": f"Which colour has {doc}?",
                "image": None,
            }
            for doc in docs
        ]


def changed_layers(plan: Plan | None) -> int:
    """Number of layers that a plan changes."""
    return sum(mode is not Mode.FULL for mode in plan.modes) if plan else 0


def make_sweep(path: Path, arch: Architecture = ARCH) -> Path:
    """A finished sweep folder in which deeper layers have a smaller LC."""
    sizes = {"config_digest": arch.config_digest, "details": {"architecture": dataclasses.asdict(arch)}}
    runs.make_sweep(path, layers=arch.num_layers, modes=[Mode.FREEZE_VISUAL], model="tiny", revision=None, **sizes)
    return path
