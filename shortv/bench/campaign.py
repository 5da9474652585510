"""A campaign against runs of lmms-eval, an endpoint under overload, and scores by each way to the model."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from rich.console import Console

from reports.store import Folder
from shortv.architecture import Architecture
from shortv.bench.lmms_runs import TASK, LmmsRun, run_lmms_eval
from shortv.bench.load import Load, bodies_of, closed_loop, open_loop, running_endpoint
from shortv.families import load_architecture
from shortv.plan import Mode, Plan
from shortv.spec import WorkerRange
from shortv.sweep.planning import Control, replacement_order
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.runner import ReplicaRunner
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.serving.spec import BUNDLED_NAME

TINY = Path(__file__).resolve().parents[1] / "tiny"
JOB = TINY.parents[1] / "jobs" / "serve.py"
MODEL, TASKS, BENCHMARK = TINY / "model", TINY / "task", TINY / "benchmark.parquet"
_MOST_REPLICAS = 8


class SpeedResult(NamedTuple):
    """Seconds of evaluation and of start-up, for six runs of lmms-eval and for one campaign with the same plans."""

    lmms: Sequence[LmmsRun]
    campaign_seconds: float
    campaign_startup: float
    replicas: int
    same_scores: bool

    @property
    def ratio(self) -> float:
        """Time of the lmms-eval runs over the time of the campaign, without start-up."""
        return sum(run.seconds for run in self.lmms) / self.campaign_seconds

    @property
    def ratio_with_startup(self) -> float:
        """The same ratio with start-up."""
        return sum(run.seconds + run.startup for run in self.lmms) / (self.campaign_seconds + self.campaign_startup)


def bench_speed(limit: int, console: Console) -> SpeedResult:
    """Six plans through one campaign, and through six processes of lmms-eval at batch 1."""
    with bench_plans() as files:
        runs = []
        for name, file in files.items():
            arguments = {"pretrained": MODEL, **({"plan": file} if file else {})}
            runs.append(run_lmms_eval("shortv", arguments, limit=limit, include_path=TASKS))
            console.print(f"lmms_eval {name}: {runs[-1].seconds:.1f} s after {runs[-1].startup:.1f} s", highlight=False)
        started = time.perf_counter()
        # A replica computes in one thread here, and lmms_eval in as many as there are cores.
        replicas = min(os.cpu_count() or 1, _MOST_REPLICAS)
        cells, scores = _campaign([str(file) for file in files.values() if file], limit, replicas=replicas)
        whole = time.perf_counter() - started
    same = scores == [run.scores for run in runs]
    return SpeedResult(runs, cells, whole - cells, replicas, same)


@contextmanager
def bench_plans() -> Iterator[dict[str, Path | None]]:
    """Write plans of the bundled model: the last 4, 5 and 6 layers frozen, and two controls; full is None."""
    architecture = load_architecture(str(MODEL))
    ranking = tuple(range(architecture.num_layers))
    with tempfile.TemporaryDirectory(prefix="shortv-plans-") as folder:
        files: dict[str, Path | None] = {"full": None}
        for control, count in (
            (Control.LAST, 4),
            (Control.LAST, 5),
            (Control.LAST, 6),
            (Control.RANDOM, 5),
            (Control.FIRST, 5),
        ):
            layers = replacement_order(ranking, Mode.FREEZE_VISUAL, control=control)[:count]
            plan = _plan(f"{control}-{count}", layers, architecture)
            files[plan.name] = plan.save(Path(folder, f"{plan.name}.json"))
        yield files


def _plan(name: str, layers: Sequence[int], architecture: Architecture) -> Plan:
    return Plan.of_layers(
        Mode.FREEZE_VISUAL,
        layers,
        num_layers=architecture.num_layers,
        name=name,
        model=str(MODEL),
        config_digest=architecture.config_digest,
    )


def _campaign(plans: Sequence[str], limit: int, *, replicas: int) -> tuple[float, list[dict[str, float]]]:
    """Run a campaign in a temporary folder; returns the seconds of its cells and the scores of each cell."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as output:
        recipe = CampaignSpec(
            models=(str(MODEL),),
            plans=tuple(plans),
            tasks=(TASK,),
            limit=limit,
            replicas=WorkerRange(replicas, replicas),
            output_path=output,
        )
        quiet = Console(file=io.StringIO())
        run_campaign(recipe, runner=ReplicaRunner(quiet), console=quiet)
        folder = Folder(output)
        cells = folder.read_table("cells").to_pylist()
        metrics = folder.read_table("metrics").to_pylist()
    scores = [
        {f"{row['metric']},{row['filter']}": row["value"] for row in metrics if row["plan"] == cell["plan"]}
        for cell in cells
    ]
    return sum(cell["wall_seconds"] for cell in cells), scores


class LoadResult(NamedTuple):
    """Load at the endpoint's capacity, and at twice that rate."""

    capacity: Load
    overload: Load
    rate: float


def bench_load(seconds: float, *, clients: int = 32, warm_up: float = 5.0, closed: float = 20.0) -> LoadResult:
    """Measure an endpoint on loopback with a closed loop, then with an open loop at twice its goodput."""
    rows = pq.read_table(BENCHMARK).to_pylist()
    prompts = [(_uri(row["images"][0]), row["prompt"]) for row in rows]
    bodies = bodies_of(prompts, BUNDLED_NAME)

    async def measure(url: str) -> LoadResult:
        await closed_loop(url, bodies, clients=clients, seconds=warm_up)
        capacity = await closed_loop(url, bodies, clients=clients, seconds=closed)
        rate = 2 * capacity.goodput
        return LoadResult(capacity, await open_loop(url, bodies, rate=rate, seconds=seconds), rate)

    with running_endpoint(JOB, ()) as url:
        return asyncio.run(measure(url))


def _uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def bench_scores(limit: int, plan: str = "last-5") -> Mapping[str, Mapping[str, float]]:
    """Scores of one plan, by the way its requests reach the model."""
    with bench_plans() as files:
        file = files[plan]
        found = {
            "shortv, in one process": run_lmms_eval(
                "shortv", {"pretrained": MODEL, "plan": file}, limit=limit, include_path=TASKS
            ).scores
        }
        for replicas in (1, 3):
            found[f"campaign, {replicas} replicas"] = _campaign([str(file)], limit, replicas=replicas)[1][1]
            with running_endpoint(JOB, ["--plan", str(file), "--replicas", str(replicas)]) as url:
                served = {"url": url, "model": f"{BUNDLED_NAME}@{plan}"}
                found[f"shortv_serve, {replicas} replicas"] = run_lmms_eval(
                    "shortv_serve", served, limit=limit, include_path=TASKS
                ).scores
                if replicas == 1:
                    openai = {"base_url": url, "model_version": f"{BUNDLED_NAME}@{plan}", "api_key": "none"}
                    found["lmms-eval's async_openai"] = run_lmms_eval(
                        "async_openai", openai, limit=limit, include_path=TASKS
                    ).scores
    return found


def speed_text(result: SpeedResult, limit: int) -> str:
    """Format seconds and start-up of both sides, and their ratio."""
    lmms, startup = sum(run.seconds for run in result.lmms), sum(run.startup for run in result.lmms)
    campaign = f"one campaign, {result.replicas} replicas"
    return (
        f"six plans x {limit} documents\n"
        f"{'':28}{'seconds':>9}{'start-up':>10}\n"
        f"{'six lmms_eval runs, batch 1':28}{lmms:>9.1f}{startup:>10.1f}\n"
        f"{campaign:28}{result.campaign_seconds:>9.1f}{result.campaign_startup:>10.1f}\n"
        f"{result.ratio:.2f} times faster, {result.ratio_with_startup:.2f} with start-up; scores are "
        f"{'equal' if result.same_scores else 'NOT equal'}"
    )


def load_text(result: LoadResult) -> str:
    """Format the capacity and the overload."""
    capacity, over = result.capacity, result.overload
    return (
        f"capacity (closed loop): {capacity.goodput:.1f} responses/s, median {1e3 * capacity.median:.0f} ms\n"
        f"overload (open loop): {over.sent} requests at {result.rate:.1f}/s for {over.seconds:.0f} s: "
        f"{over.answered} answered, {over.refused} refused with 429 or 503 ({over.bare_refusals} without Retry-After), "
        f"{over.sent - over.answered - over.refused - over.silent} other, {over.silent} without a response\n"
        f"goodput {over.goodput:.1f} responses/s, {over.goodput / capacity.goodput:.0%} of the capacity; "
        f"median {1e3 * over.median:.0f} ms, p99 {1e3 * over.p99:.0f} ms\n"
        f"the client's own cost: {1e3 * over.client_cpu / over.sent:.2f} ms of CPU per request, "
        f"{over.client_cpu / over.seconds:.0%} of a core; at most {1e3 * over.lag:.0f} ms late"
    )


def scores_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """Format exact match per interface, and whether all metrics agree."""
    same = all(scores == next(iter(found.values())) for scores in found.values())
    lines = [f"{name:28}{scores['exact_match,none']:.4f}" for name, scores in found.items()]
    return "\n".join([*lines, f"all metrics of all interfaces are {'equal' if same else 'NOT equal'}"])
