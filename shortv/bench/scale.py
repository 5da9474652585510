"""A campaign on replicas that only wait: what driver, producers and Serve cost when replicas are many.

The driver, the producers and the folder are those of every campaign; the model and the task's own code are not there.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from rich.console import Console

from shortv.bench.bundled import MODEL
from shortv.bench.generated import NAME, GeneratedTask
from shortv.bench.processes import DRIVER, Meter
from shortv.bench.rows import GIB, Row
from shortv.bench.specs import ScaleBench
from shortv.bench.waiting import BATCH, Span, WaitingReplica, spans_in
from shortv.evals.benchmark import Benchmark
from shortv.plan import Plan
from shortv.spec import ModelSpec
from shortv.tiny.photos import make_photos_vqa
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.producer import Producer
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import TaskSource
from shortv.workers.campaign.workers import WINDOW, CampaignWorkers, Pool
from shortv.workers.cluster import start
from shortv.workers.models import ModelLoader
from shortv.workers.placement import Placement
from shortv.workers.serving.client import REPLICA

_PLANS = ("last@4", "last@5", "last@6", "random:0@5", "first@5")
# So many CPUs in name that a campaign starts two producers.
_CPUS = 16
_ROLES = {DRIVER: "driver", "_Producer": "producers", "ServeReplica": "replicas", "ServeController": "controller"}


def bench(spec: ScaleBench) -> Iterator[Row]:
    """Run a campaign for each number of replicas."""
    chosen = set(spec.parts) or {"simulated", "images", "real"}
    for replicas in spec.replicas:
        for part in ("simulated", "images"):
            if part in chosen:
                yield _measured(spec, replicas, _processes(replicas, spec.processes), images=part == "images")
    if "real" in chosen:
        yield _measured(spec, spec.real_replicas, spec.real_replicas, images=False)


def _processes(replicas: int, most: int) -> int:
    """Return the most processes in which so many replicas can be simulated, as many in each."""
    return max(count for count in range(1, min(replicas, most) + 1) if replicas % count == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """So many replicas in so many processes of a Serve deployment, and what the documents have."""

    replicas: int
    processes: int
    seconds: float
    """Time that a batch takes under one plan."""
    documents: int
    trace: Path
    photo: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the task."""
        return {"documents": self.documents, "photo": self.photo and str(self.photo)}

    @property
    def shown(self) -> str:
        """The case in a line."""
        what = "bytes ready" if self.photo is None else "an image of 0.9 MB decoded and sent for each document"
        where = "a Serve replica each" if self.processes == self.replicas else f"in {self.processes} Serve replicas"
        return f"{self.replicas} replicas that wait, {where}; {what}"


def _measured(spec: ScaleBench, replicas: int, processes: int, *, images: bool) -> Row:
    """Run a campaign, and count from the moment when all replicas work until only documents on their way are left."""
    rate = BATCH * replicas / (spec.service_seconds * (len(_PLANS) + 1))
    ahead = replicas * WINDOW
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        case = _Case(
            replicas=replicas,
            processes=processes,
            seconds=spec.service_seconds,
            documents=2 * ahead + round(spec.seconds * rate),
            trace=Path(folder, "trace"),
            photo=_photo_in(Path(folder)) if images else None,
        )
        case.trace.mkdir()
        with Meter() as meter:
            _run(case, Path(folder, "out"))
        spans = sorted(spans_in(case.trace), key=lambda span: span.ended)
    begin, end = steady(spans, case.documents - ahead)
    done = sum(span.documents_within(begin, end) for span in spans)
    first, last = meter.used(begin, end)
    answers = done * (len(_PLANS) + 1)
    return Row(
        case=case.shown,
        baseline_ms=1e3 * done / rate,
        measured_ms=1e3 * (end - begin),
        ratio=(end - begin) * rate / done,
        figures={
            "of_ideal": done / rate / (end - begin),
            "answers_per_s": answers / (end - begin),
            **{
                f"{shown}_us_per_answer": 1e6 * (last.cpu.get(role, 0.0) - first.cpu.get(role, 0.0)) / answers
                for role, shown in _ROLES.items()
            },
            "driver_mb_per_100000_answers": (last.memory - first.memory) / 1e6 / answers * 1e5,
            "driver_peak_gib": max(sample.memory for sample in meter.samples) / GIB,
            "answers": case.documents * (len(_PLANS) + 1),
        },
    )


def _run(case: _Case, output: Path) -> None:
    """Run the campaign of a case in this process."""
    start(num_cpus=_CPUS, num_gpus=0, log_to_driver=False, logging_level="ERROR")
    try:
        spec = CampaignSpec(models=(str(MODEL),), plans=_PLANS, tasks=(NAME,), output_path=str(output))
        run_campaign(spec, workers=_Workers(case), console=Console(file=io.StringIO()))
    finally:
        ray.shutdown()


def _photo_in(folder: Path) -> Path:
    """Write a photo into a folder."""
    make_photos_vqa(folder, n=1)
    file = folder / "photo.jpg"
    file.write_bytes(pq.read_table(folder / "photos_vqa.parquet")["image"][0].as_py()["bytes"])
    return file


def steady(spans: Sequence[Span], sent: int) -> tuple[float, float]:
    """Return when 99 % of the replicas have begun their first batch, and when so many documents were done."""
    first: dict[str, float] = {}
    done, end = 0, 0.0
    for span in spans:
        first[span.replica] = min(span.began, first.get(span.replica, span.began))
        if done < sent:
            done, end = done + span.documents, span.ended
    # Where there are many, a few are drawn late.
    return sorted(first.values())[-1 - len(first) // 100], end


class _Producer(Producer):
    """A producer of the task in memory."""

    def load(self, task: TaskSource) -> Benchmark:
        """Return the task that the settings describe."""
        return GeneratedTask(**task.settings)


class _Pool(Pool):
    """The pool of a campaign, with replicas that wait."""

    def __init__(self, spec: CampaignSpec, loader: ModelLoader, case: _Case, source: TaskSource) -> None:
        self._case = case
        placement = Placement(low=case.processes, high=case.processes, cpus=0, gpus=0)
        sources = {source.name: source}
        super().__init__(spec, loader, placement, sources, note=lambda text: None, producer=_Producer)

    def application(self, model: ModelSpec, plans: Sequence[Plan]) -> Any:
        """Return a deployment of so many processes as the case has, with its share of the replicas in each."""
        case = self._case
        deployment: Any = serve.deployment(
            WaitingReplica,
            name=REPLICA,
            num_replicas=case.processes,
            max_ongoing_requests=100_000,
            max_queued_requests=-1,
            ray_actor_options={"num_cpus": 0},
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )
        return deployment.bind(
            replicas=case.replicas // case.processes,
            seconds=case.seconds,
            digests={plan.name: plan.digest for plan in plans},
            trace=str(case.trace),
        )

    @property
    def replicas(self) -> int:
        """The replicas that are simulated."""
        return self._case.replicas


class _Workers(CampaignWorkers):
    """A campaign's workers with replicas that wait and a task in memory."""

    def __init__(self, case: _Case) -> None:
        super().__init__(Console(file=io.StringIO()))
        self._case = case

    def task(self, name: str, spec: CampaignSpec) -> Benchmark:
        """Return the task in memory."""
        return GeneratedTask(**self._case.settings)

    @contextmanager
    def open(self, spec: CampaignSpec, tasks: Sequence[Benchmark]) -> Iterator[Pool]:
        """Start producers on the cluster that runs; the replicas are those of the case."""
        serve.start(proxy_location="Disabled")
        source = TaskSource(name=NAME, digest=tasks[0].digest, settings=self._case.settings)
        pool = _Pool(spec, self.loader, self._case, source)
        try:
            yield pool
        finally:
            pool.close()
