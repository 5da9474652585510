"""A campaign against runs of lmms-eval, on photographs and on small pictures, and scores by each way to the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.store import Folder
from shortv.bench import specs
from shortv.bench.bundled import CONTROLS, MODEL, TASKS, plan_of, saved
from shortv.bench.endpoint import running_endpoint
from shortv.bench.processes import DRIVER, Meter
from shortv.bench.rows import Row
from shortv.errors import ShortVError
from shortv.tiny.photos import make_photos_vqa
from shortv.workers.serving.spec import BUNDLED_NAME

JOB = Path(__file__).resolve().parents[2] / "jobs" / "campaign.py"
_LIMIT_S = 1800.0
# What the driver prints when it can send documents.
_RUNNING = "replicas of"
_ROLES = {DRIVER: "driver", "Producer": "producers", "ServeReplica": "replicas"}
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
# Ray starts workers at niceness 15, so that anything else on a machine would outrank them.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "RAY_worker_niceness": "0"}
Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Seconds of an evaluation, seconds of all the rest, and the scores of each plan by `metric,filter`."""

    seconds: float
    startup: float
    scores: Sequence[Scores]
    figures: Mapping[str, float] = field(default_factory=dict)


def bench(spec: specs.CampaignBench) -> Iterator[Row]:
    """Run the chosen parts."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        files = saved([plan_of(control, count) for control, count in CONTROLS], Path(folder))
        make_photos_vqa(folder, n=spec.limit)
        if "speed" in spec.parts or not spec.parts:
            for task in spec.tasks:
                yield from _speed(spec, task, files, include=Path(folder))
        if "scores" in spec.parts or not spec.parts:
            yield from _scores(spec.limit, files["freeze-visual-last-5"])


def _speed(spec: specs.CampaignBench, task: str, files: Mapping[str, Path], *, include: Path) -> Iterator[Row]:
    """The full model and five plans: a process of lmms-eval for each, at each batch size, and campaigns."""
    campaigns = {
        replicas: _campaign(list(files.values()), task, spec.limit, replicas=replicas, include=include)
        for replicas in spec.replicas
    }
    for replicas, run in campaigns.items():
        case = f"{task}, {1 + len(files)} plans x {spec.limit} documents, campaign on {replicas} replicas"
        yield Row(case=case, measured_ms=1e3 * run.seconds, figures={"startup_s": run.startup, **run.figures})
    for batch_size in spec.batch_sizes:
        runs = []
        for file in (None, *files.values()):
            arguments = {"pretrained": MODEL, **({"plan": file} if file else {})}
            runs.append(_lmms_eval("shortv", arguments, task, spec.limit, batch_size=batch_size, include=include))
        seconds, startup_s = (sum(getattr(run, name) for run in runs) for name in ("seconds", "startup"))
        scores = [score for run in runs for score in run.scores]
        for replicas, ours in campaigns.items():
            yield Row(
                case=f"{task}, campaign on {replicas} replicas, lmms_eval {len(runs)} times at batch {batch_size}",
                baseline_ms=1e3 * seconds,
                measured_ms=1e3 * ours.seconds,
                ratio=ours.seconds / seconds,
                figures={
                    "times_faster": seconds / ours.seconds,
                    "times_faster_with_startup": (seconds + startup_s) / (ours.seconds + ours.startup),
                    "lmms_eval_startup_s": startup_s,
                    "same_scores": ours.scores == scores,
                },
            )


def _scores(limit: int, plan: Path) -> Iterator[Row]:
    """Scores of one plan by the way its requests reach the model; `equal` compares all metrics with the first way."""
    name, task = f"{BUNDLED_NAME}@{plan.stem}", "shapes_vqa"
    found = {"shortv, in one process": _lmms_eval("shortv", {"pretrained": MODEL, "plan": plan}, task, limit)}
    for replicas in (1, 3):
        found[f"campaign, {replicas} replicas"] = _campaign([plan], task, limit, replicas=replicas)
        with running_endpoint("--plan", str(plan), "--replicas", str(replicas)) as endpoint:
            served = _lmms_eval("shortv_serve", {"url": endpoint.url, "model": name}, task, limit)
            found[f"shortv_serve, {replicas} replicas"] = served
            if replicas == 1:
                openai = {"base_url": endpoint.url, "model_version": name, "api_key": "none"}
                found["lmms-eval's async_openai"] = _lmms_eval("async_openai", openai, task, limit)
    first = next(iter(found.values())).scores[-1]
    for way, run in found.items():
        scores = run.scores[-1]
        yield Row(case=way, figures={"exact_match": scores["exact_match,none"], "equal": scores == first})


def _campaign(plans: Sequence[Path], task: str, limit: int, *, replicas: int, include: Path | None = None) -> Run:
    """Run a campaign of the full model and the plans by its command. Raises ShortVError when it fails."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as output:
        command = [sys.executable, "-u", str(JOB), "--plans", ",".join(map(str, plans)), "--tasks", task]
        command += ["--limit", str(limit), "--replicas", str(replicas), "--output-path", output]
        command += ["--include-path", str(include)] if include else []
        began, lines = time.time(), []
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **_ENVIRONMENT}
        )
        assert process.stdout is not None
        with Meter(process.pid) as meter:
            for line in process.stdout:
                lines.append((time.time(), line.strip()))
            process.wait()
        if process.returncode:
            raise ShortVError(f"the campaign failed: {(lines or [(0.0, 'no output')])[-1][1][:300]}")
        phases = _phases(lines, Path(output), began, time.time())
        tables = {name: Folder(output).read_table(name).to_pylist() for name in ("cells", "metrics", "speed")}
        return _run_of(tables, phases, meter)


def _phases(lines: Sequence[tuple[float, str]], output: Path, began: float, ended: float) -> Mapping[str, float]:
    """Return the seconds of a campaign until the replicas run, until the last answer is committed, and so on."""

    def written(folder: str) -> float:
        return max(file.stat().st_mtime for file in (output / folder).iterdir())

    running = next(at for at, line in lines if _RUNNING in line)
    tables = next(at for at, line in lines if line.startswith("[1/"))
    moments = [began, running, written("answers"), written("measured"), tables, ended]
    names = ("start_s", "answer_s", "measure_s", "tables_s", "end_s")
    return {name: after - before for name, before, after in zip(names, moments, moments[1:], strict=False)}


def _run_of(tables: Mapping[str, list[dict[str, Any]]], phases: Mapping[str, float], meter: Meter) -> Run:
    """Count answers, scores and their tables as the evaluation, as lmms-eval's clock does."""
    cells, metrics, speed = tables["cells"], tables["metrics"], tables["speed"]
    scores = [
        {f"{row['metric']},{row['filter']}": row["value"] for row in metrics if row["plan"] == cell["plan"]}
        for cell in cells
    ]
    answers = sum(cell["n"] for cell in cells)
    idle = [row["idle_share"] for row in speed if row["idle_share"] is not None]
    used = meter.used()[1].cpu
    figures = {
        "answers_per_s": answers / phases["answer_s"],
        "idle_share": max(idle, default=float("nan")),
        **phases,
        **{f"{shown}_cpu_s": used.get(role, 0.0) for role, shown in _ROLES.items()},
    }
    startup = phases["start_s"] + phases["end_s"]
    return Run(seconds=phases["answer_s"] + phases["tables_s"], startup=startup, scores=scores, figures=figures)


def _lmms_eval(
    model: str,
    model_args: Mapping[str, object],
    task: str,
    limit: int,
    *,
    batch_size: int = 1,
    include: Path = TASKS,
) -> Run:
    """Score a task by `python -m lmms_eval` in its own process; raises ShortVError without results."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        clock = Path(folder, "seconds")
        arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
        command = [sys.executable, "-c", _TIMED, str(clock), "--model", model, "--model_args", arguments]
        command += ["--tasks", task, "--limit", str(limit), "--batch_size", str(batch_size)]
        command += ["--include_path", str(TASKS if task.startswith("shapes") else include)]
        command += ["--output_path", str(Path(folder, "out"))]
        started = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, env={**os.environ, **_ENVIRONMENT}
        )
        whole = time.perf_counter() - started
        # lmms-eval exits with 0 after a failed run too.
        results = sorted(Path(folder, "out").rglob("*results.json"))
        if not results or not clock.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ShortVError(f"lmms_eval --model {model} wrote no results: {last[:300]}")
        seconds = float(clock.read_text())
        found = json.loads(results[-1].read_text())["results"][task]
    scores = {name: value for name, value in found.items() if isinstance(value, float) and "stderr" not in name}
    return Run(seconds=seconds, startup=whole - seconds, scores=[scores])
