"""A campaign against runs of lmms-eval, an endpoint under overload, and scores by each way to the model."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from rich.console import Console

from reports.store import Folder
from shortv.bench import specs
from shortv.bench.load import Load, bodies_of, closed_loop, open_loop, running_endpoint
from shortv.bench.rows import Row
from shortv.errors import ShortVError
from shortv.families import load_architecture
from shortv.plan import Mode, Plan
from shortv.spec import WorkerRange
from shortv.sweep.planning import Control, replacement_order
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.workers import CampaignWorkers
from shortv.workers.serving.spec import BUNDLED_NAME

MODEL, TASKS, TASK = specs.TINY / "model", specs.TINY / "task", "shapes_vqa"
_PLANS = ((Control.LAST, 4), (Control.LAST, 5), (Control.LAST, 6), (Control.RANDOM, 5), (Control.FIRST, 5))
_MOST_REPLICAS = 8
_LIMIT_S = 1800.0
# lmms-eval's command with a clock around its evaluation; loading libraries, the model and the task is start-up.
_TIMED = """
import sys, time
import lmms_eval.evaluator as evaluator
own, file = evaluator.evaluate, sys.argv.pop(1)
def evaluate(*args, **kwargs):
    started = time.perf_counter()
    found = own(*args, **kwargs)
    with open(file, "w") as stream:
        stream.write(str(time.perf_counter() - started))
    return found
evaluator.evaluate = evaluate
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


class Run(NamedTuple):
    """Seconds of an evaluation, seconds of all the rest, and the scores of each plan by `metric,filter`."""

    seconds: float
    startup: float
    scores: Sequence[Mapping[str, float]]


def bench(spec: specs.CampaignBench) -> Iterator[Row]:
    """Run the chosen parts."""
    with _plans() as files:
        if "speed" in spec.parts or not spec.parts:
            yield from _speed(spec.limit, files)
        if "load" in spec.parts or not spec.parts:
            yield from _load(spec.seconds)
        if "scores" in spec.parts or not spec.parts:
            yield from _scores(spec.limit, files["last-5"])


@contextmanager
def _plans() -> Iterator[dict[str, Path]]:
    """Write plans of the bundled model: the last 4, 5 and 6 layers frozen, and two controls."""
    architecture = load_architecture(str(MODEL))
    ranking = tuple(range(architecture.num_layers))
    with tempfile.TemporaryDirectory(prefix="shortv-plans-") as folder:
        files = {}
        for control, count in _PLANS:
            plan = Plan.of_layers(
                Mode.FREEZE_VISUAL,
                replacement_order(ranking, Mode.FREEZE_VISUAL, control=control)[:count],
                num_layers=architecture.num_layers,
                name=f"{control}-{count}",
                model=str(MODEL),
                config_digest=architecture.config_digest,
            )
            files[plan.name] = plan.save(Path(folder, f"{plan.name}.json"))
        yield files


def _speed(limit: int, files: Mapping[str, Path]) -> Iterator[Row]:
    """The full model and five plans through a process of lmms-eval each at batch 1, and through one campaign."""
    runs = []
    for name, file in {"full": None, **files}.items():
        arguments = {"pretrained": MODEL, **({"plan": file} if file else {})}
        runs.append(_lmms_eval("shortv", arguments, limit=limit))
        startup = {"startup_s": runs[-1].startup}
        yield Row(case=f"lmms_eval, {name}, {limit} documents", measured_ms=1e3 * runs[-1].seconds, figures=startup)
    # A replica computes in one thread here, and lmms_eval in as many as there are cores.
    replicas = min(os.cpu_count() or 1, _MOST_REPLICAS)
    ours = _campaign(list(files.values()), limit, replicas=replicas)
    seconds, startup_s = (sum(getattr(run, name) for run in runs) for name in ("seconds", "startup"))
    yield Row(
        case=f"{len(runs)} plans x {limit} documents, one campaign against lmms_eval runs at batch 1",
        baseline_ms=1e3 * seconds,
        measured_ms=1e3 * ours.seconds,
        ratio=ours.seconds / seconds,
        figures={
            "times_faster": seconds / ours.seconds,
            "times_faster_with_startup": (seconds + startup_s) / (ours.seconds + ours.startup),
            "lmms_eval_startup_s": startup_s,
            "startup_s": ours.startup,
            "replicas": replicas,
            "same_scores": ours.scores == [score for run in runs for score in run.scores],
        },
    )


def _load(seconds: float) -> Iterator[Row]:
    """An endpoint on loopback under a closed loop, which gives its capacity, then under twice that rate."""
    table = pq.read_table(specs.TINY / "benchmark.parquet", columns=["images", "prompt"])
    bodies = bodies_of([(row["images"][0], row["prompt"]) for row in table.to_pylist()], BUNDLED_NAME)

    async def measure(url: str) -> tuple[Load, Load]:
        await closed_loop(url, bodies, clients=32, seconds=5.0)
        capacity = await closed_loop(url, bodies, clients=32, seconds=20.0)
        return capacity, await open_loop(url, bodies, rate=2 * capacity.goodput, seconds=seconds)

    with running_endpoint() as url:
        capacity, overload = asyncio.run(measure(url))
    yield Row(case="endpoint, closed loop", figures=capacity.figures())
    shares = {"of_capacity": overload.goodput / capacity.goodput}
    yield Row(case="endpoint, open loop at twice its capacity", figures=shares | overload.figures())


def _scores(limit: int, plan: Path) -> Iterator[Row]:
    """Scores of one plan by the way its requests reach the model; `equal` compares all metrics with the first way."""
    name = f"{BUNDLED_NAME}@{plan.stem}"
    found = {"shortv, in one process": _lmms_eval("shortv", {"pretrained": MODEL, "plan": plan}, limit=limit)}
    for replicas in (1, 3):
        found[f"campaign, {replicas} replicas"] = _campaign([plan], limit, replicas=replicas)
        with running_endpoint("--plan", str(plan), "--replicas", str(replicas)) as url:
            served = _lmms_eval("shortv_serve", {"url": url, "model": name}, limit=limit)
            found[f"shortv_serve, {replicas} replicas"] = served
            if replicas == 1:
                openai = {"base_url": url, "model_version": name, "api_key": "none"}
                found["lmms-eval's async_openai"] = _lmms_eval("async_openai", openai, limit=limit)
    first = next(iter(found.values())).scores[-1]
    for way, run in found.items():
        scores = run.scores[-1]
        yield Row(case=way, figures={"exact_match": scores["exact_match,none"], "equal": scores == first})


def _campaign(plans: Sequence[Path], limit: int, *, replicas: int) -> Run:
    """Run a campaign of the full model and the plans in a temporary folder."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as output:
        recipe = CampaignSpec(
            models=(str(MODEL),),
            plans=tuple(map(str, plans)),
            tasks=(TASK,),
            limit=limit,
            replicas=WorkerRange(replicas, replicas),
            output_path=output,
        )
        quiet = Console(file=io.StringIO())
        run_campaign(recipe, workers=CampaignWorkers(quiet), console=quiet)
        cells, metrics = (Folder(output).read_table(name).to_pylist() for name in ("cells", "metrics"))
    scores = [
        {f"{row['metric']},{row['filter']}": row["value"] for row in metrics if row["plan"] == cell["plan"]}
        for cell in cells
    ]
    seconds = sum(cell["busy_seconds"] for cell in cells)
    return Run(seconds, time.perf_counter() - started - seconds, scores)


def _lmms_eval(model: str, model_args: Mapping[str, object], *, limit: int) -> Run:
    """Score the bundled task by `python -m lmms_eval` in its own process; raises ShortVError without results."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        clock = Path(folder, "seconds")
        arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
        command = [sys.executable, "-c", _TIMED, str(clock), "--model", model, "--model_args", arguments]
        command += ["--tasks", TASK, "--limit", str(limit), "--include_path", str(TASKS), "--batch_size", "1"]
        command += ["--output_path", str(Path(folder, "out"))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=environment)
        whole = time.perf_counter() - started
        # lmms-eval exits with 0 after a failed run too.
        results = sorted(Path(folder, "out").rglob("*results.json"))
        if not results or not clock.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ShortVError(f"lmms_eval --model {model} wrote no results: {last[:300]}")
        seconds = float(clock.read_text())
        found = json.loads(results[-1].read_text())["results"][TASK]
    scores = {name: value for name, value in found.items() if isinstance(value, float) and "stderr" not in name}
    return Run(seconds, whole - seconds, [scores])
