"""A campaign whose replicas, producers and driver are killed on a schedule, against the same campaign undisturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from reports.answers import Answers
from reports.store import Folder
from shortv.bench import specs
from shortv.bench.rows import Row
from shortv.errors import ShortVError
from shortv.tiny.photos import make_photos_vqa
from shortv.workers.campaign.folder import TABLES
from shortv.workers.cluster import start

ROOT: Final = Path(__file__).resolve().parents[2]
_SIZE: Final = (128, 96)
_POLL_S: Final = 0.5
_LIMIT_S: Final = 3600.0
# What Ray names the processes of replicas and producers.
_VICTIMS: Final = {"replica": "ServeReplica:shortv-campaign", "producer": "Producer"}
# What of the tables does not depend on clocks.
_TIMELESS: Final = {"speed": ("cell", "model", "plan", "task", "n", "t", "v", "flops_ratio")}
_CLOCKS: Final = ("busy_seconds",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """Seconds between kills of replicas and of producers, and how many times the driver is killed."""

    replica_s: float
    producer_s: float
    drivers: int
    driver_s: float
    """Seconds of work between kills of the driver."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a campaign left behind: seconds from the first start to the end, and the kills by kind."""

    folder: Path
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)


def bench(spec: specs.KillsBench) -> Iterator[Row]:
    """Run a campaign twice on a Ray of this process, once under kills."""
    with tempfile.TemporaryDirectory(prefix="shortv-kills-") as name:
        folder = Path(name)
        tasks = make_photos_vqa(folder / "tasks", n=spec.documents, size=_SIZE, name="kills_vqa")
        # At niceness 15, Ray's own, anything else on the machine would outrank replicas.
        os.environ.setdefault("RAY_worker_niceness", "0")
        start(num_cpus=4, log_to_driver=False, logging_level="ERROR")
        try:
            whole, killed = Outcome(folder=folder / "whole"), Outcome(folder=folder / "killed")
            command = _command(spec, tasks)
            run(whole, command, None)
            kills = Kills(
                replica_s=spec.replica_seconds,
                producer_s=spec.producer_seconds,
                drivers=spec.drivers,
                # Early enough that the last driver has work left.
                driver_s=whole.seconds / (spec.drivers + 2),
            )
            run(killed, command, kills)
            left = len(_found("replica"))
        finally:
            ray.shutdown()
        yield Row(
            case=f"{spec.documents * (len(spec.plans) + 1)} answers, {spec.replicas} replicas",
            baseline_ms=1e3 * whole.seconds,
            measured_ms=1e3 * killed.seconds,
            ratio=killed.seconds / whole.seconds,
            figures={
                **{f"{kind}s_killed": killed.kills[kind] for kind in (*_VICTIMS, "driver")},
                **compared(whole.folder, killed.folder),
                "replicas_left": left,
                "added_s": killed.seconds - whole.seconds,
            },
        )


def _command(spec: specs.KillsBench, tasks: Path) -> list[str]:
    arguments = {
        "tasks": "kills_vqa",
        "include-path": str(tasks),
        "plans": ",".join(spec.plans),
        "replicas": str(spec.replicas),
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "jobs" / "campaign.py"), *flags]


def run(outcome: Outcome, command: Sequence[str], kills: Kills | None) -> None:
    """Run a campaign to its end in processes of its own, started anew after every kill of the driver.

    Raises:
        ShortVError: it failed, or does not end.
    """
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    draw, began = random.Random(0), time.monotonic()
    log = outcome.folder.with_suffix(".log")
    while True:
        with log.open("w") as stream:
            driver = subprocess.Popen(
                [*command, "--output-path", str(outcome.folder)], stdout=stream, stderr=stream, env=environment
            )
        try:
            _watch(driver, outcome, kills, draw, began + _LIMIT_S)
        finally:
            driver.kill()
        status = driver.wait()
        if status == 0:
            outcome.seconds = time.monotonic() - began
            return
        if status != -signal.SIGKILL:
            raise ShortVError(f"the campaign ended with status {status}: {log.read_text('utf-8')[-500:]}")


def _watch(
    driver: subprocess.Popen[bytes], outcome: Outcome, kills: Kills | None, draw: random.Random, deadline: float
) -> None:
    """Return when the driver has ended, by itself or by a kill; kill replicas and producers meanwhile."""
    working: float | None = None
    due: dict[str, float] = {}
    before = _parts(outcome.folder)
    while driver.poll() is None:
        if time.monotonic() > deadline:
            raise ShortVError(f"the campaign does not end within {_LIMIT_S:.0f} s")
        time.sleep(_POLL_S)
        now = time.monotonic()
        if kills is None or _parts(outcome.folder) == before:
            continue
        if working is None:
            # A driver commits something before the first kill, so that the run ends.
            working, due = now, {"replica": now + kills.replica_s, "producer": now + kills.producer_s}
        for kind, pause in (("replica", kills.replica_s), ("producer", kills.producer_s)):
            if now >= due[kind] and _kill(kind, draw):
                outcome.kills[kind] += 1
                due[kind] = now + pause
        if outcome.kills["driver"] < kills.drivers and now - working >= kills.driver_s:
            driver.kill()
            outcome.kills["driver"] += 1
            return


def _parts(folder: Path) -> int:
    return len(list(folder.glob("answers/*.parquet")))


def _kill(kind: str, draw: random.Random) -> bool:
    found = _found(kind)
    if found:
        with suppress(psutil.NoSuchProcess):
            draw.choice(found).kill()
    return bool(found)


def _found(kind: str) -> list[psutil.Process]:
    """Return the processes of replicas or producers on this machine's Ray, which is a child of this process."""
    return [one for one in psutil.Process().children(recursive=True) if _VICTIMS[kind] in _title(one)]


def _title(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return title if title.startswith("ray::") else ""


def compared(whole: Path, killed: Path) -> dict[str, float]:
    """Return how many answers a campaign lost and repeated, and in how many tables it differs from another."""
    every = pa.concat_tables(
        pq.read_table(part, columns=["cell", "doc", "error"]) for part in sorted((killed / "answers").glob("*.parquet"))
    )
    pairs = Counter(zip(every["cell"].to_pylist(), every["doc"].to_pylist(), strict=True))
    wanted = {(row["cell"], row["doc"]) for row in _answers(whole)}
    return {
        "answers_lost": len(wanted - pairs.keys()),
        "answers_repeated": sum(pairs.values()) - len(pairs),
        "errors": len(every) - every["error"].null_count,
        "tables_that_differ": sum(left != right for left, right in zip(_tables(whole), _tables(killed), strict=True)),
    }


def _tables(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each table without times, the answers last and in one order."""
    for name in TABLES:
        table = Folder(str(folder)).read_table(name, _TIMELESS.get(name))
        yield table.drop_columns([column for column in _CLOCKS if column in table.column_names]).to_pylist()
    yield _answers(folder)


def _answers(folder: Path) -> list[dict[str, Any]]:
    columns = ("cell", "doc", "sample_id", "prediction", "target", "scores", "error", "values")
    rows = [row for part in Answers(Folder(str(folder))).scan(columns) for row in part.to_pylist()]
    return sorted(rows, key=lambda row: (row["cell"], row["doc"]))
