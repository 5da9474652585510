"""jobs/campaign.py on Ray with the bundled model: stopped, continued, a replica killed, always the same answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.campaign import main
from reports.store import Folder
from shortv.evals.benchmark import Benchmark
from shortv.evals.generation import generate
from shortv.evals.requests import Conversation
from shortv.families import load_architecture
from shortv.families.preprocessing import prompt_of
from shortv.layers.apply import executing
from shortv.plan import Mode, Plan
from shortv.workers.progress import SampleProgress
from tests.tiny_model import bundled

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
MODEL = "shortv/tiny/model"
LIMIT = 24
MANY = 400
OF_A_RUN = {
    *("latency_ms", "queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "prefill_batch", "decode_ms", "busy_ms"),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two plan files."""
    folder = tmp_path_factory.mktemp("plans")
    found = load_architecture(str(ROOT / MODEL))
    for name, mode, layers in (("last-3", Mode.FREEZE_VISUAL, (5, 6, 7)), ("exit-1", Mode.DROP_VISUAL, range(1, 8))):
        plan = Plan.of_layers(
            mode, layers, num_layers=found.num_layers, name=name, model=MODEL, config_digest=found.config_digest
        )
        plan.save(folder / f"{name}.json")
    return [str(folder / "last-3.json"), str(folder / "exit-1.json")]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def arguments(output: Path, *plans: str, limit: int = LIMIT) -> list[str]:
    return ["--plans", ",".join(plans), "--limit", str(limit), "--output-path", str(output)]


def answers(output: Path, limit: int = LIMIT) -> dict[str, list[dict[str, Any]]]:
    """The answers of each plan without what depends on the run. No question was answered twice."""
    folder = Folder(str(output))
    cells = folder.read_table("cells").to_pylist()
    assert all((cell["state"], cell["n"], cell["errors"]) == ("complete", limit, 0) for cell in cells)
    found = folder.read_tables("answers").sort_by("doc").to_pylist()
    rows = [{name: value for name, value in row.items() if name not in OF_A_RUN} for row in found]
    assert len({(row["cell"], row["doc"]) for row in rows}) == len(rows)
    return {cell["plan"]: [row for row in rows if row["cell"] == cell["cell"]] for cell in cells}


def in_process(plan: Plan | None, limit: int = LIMIT) -> list[str]:
    """The answers of transformers' generate to the questions of the task."""
    loaded, benchmark = bundled(), Benchmark("shapes_vqa", limit=limit)
    texts = []
    with executing(loaded.model, plan.modes if plan else (Mode.FULL,) * 8):
        for instance in benchmark.instances(range(limit)):
            request = Conversation(instance, benchmark.documents).request()
            settings = {"do_sample": False, "max_new_tokens": request.sampling.max_tokens}
            prompt = prompt_of(loaded, request.messages)
            texts.append(generate(loaded, [prompt], settings, request.sampling.stop)[0].text)
    return texts


@pytest.mark.usefixtures("local_ray")
def test_a_campaign_answers_as_the_model_in_process_and_repeats_itself(
    job: Any, tmp_path: Path, plans: list[str]
) -> None:
    status, said = job(main, *arguments(tmp_path / "out", *plans))
    # How long starting took and how fast it went are not shown again.
    lines = [line for line in said.splitlines() if not line.endswith("samples/s") and "replicas of" not in line]
    assert status == 0 and lines[0] == "3 cells, 0 finished" and lines[1].startswith("[1/3] "), said
    assert said.count(" 24 samples") == 3
    found = answers(tmp_path / "out")
    assert list(found) == ["full", "last-3", "exit-1"] and found["exit-1"] != found["full"]
    for plan in (None, *map(Plan.load, plans)):
        name = plan.name if plan else "full"
        assert [row["prediction"] for row in found[name]] == in_process(plan), name
    # A finished campaign is shown again and left as it is.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".driver.lock"}
    status, again = job(main, *arguments(tmp_path / "out", *plans))
    assert status == 0 and again.startswith("3 cells, 3 finished\n")
    assert again.splitlines()[1:] == lines[4:]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_campaign_continues_and_takes_another_plan_while_a_replica_and_a_producer_die(
    job: Any, tmp_path: Path, plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stop_after_two_units(output, plans[0])
    earlier = Folder(str(output)).read_tables("answers").sort_by([("cell", "ascending"), ("doc", "ascending")])
    assert 0 < len(earlier) < 2 * MANY
    killed = kill_one_of_each_after(2, monkeypatch)
    more = ("--replicas", "2", "--batch-size", "4", "--num-concurrent", "12")
    status, said = job(main, *arguments(output, *plans, limit=MANY), *more)
    assert status == 0 and "3 cells, 0 finished" in said, said
    assert killed == [2, 1]
    # None is missing, none counted twice, and each is what the model says in one process.
    found = answers(output, MANY)
    for plan in (None, *map(Plan.load, plans)):
        name = plan.name if plan else "full"
        assert [row["prediction"] for row in found[name]] == in_process(plan, MANY), name
    # What was answered before the stop is as it was.
    now = Folder(str(output)).read_tables("answers").to_pylist()
    assert [row for row in earlier.to_pylist() if row not in now] == []


def stop_after_two_units(output: Path, plan: str) -> None:
    """Start a campaign in a process of its own, and stop it as `ray job stop` does."""
    log = output.parent / "log"
    with log.open("w") as stream:
        command = [sys.executable, "jobs/campaign.py", *arguments(output, plan, limit=MANY)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 600
        while not (output / "answers" / "part-000002.parquet").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(300) == 128 + signal.SIGTERM, log.read_text()
    finally:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=300)
    assert [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    # All that its user has read.
    first, *between, last = log.read_text().splitlines()
    assert first == "2 cells, 0 finished" and not any("Traceback" in line for line in between)
    assert last.startswith("Error: stopped before the end; what is finished is kept")


def kill_one_of_each_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill a replica and a producer after so many units; the list tells how many of each there were."""
    advance, told, killed = SampleProgress.advance, [], []

    def advance_and_kill(self: SampleProgress, *given: int) -> None:
        advance(self, *given)
        told.append(1)
        if len(told) == count:
            names = {one: command_of(one) for one in psutil.Process().children(recursive=True)}
            for name in ("ServeReplica:shortv-campaign", "Producer"):
                some = [one for one, command in names.items() if name in command]
                os.kill(some[0].pid, signal.SIGKILL)
                killed.append(len(some))

    monkeypatch.setattr(SampleProgress, "advance", advance_and_kill)
    return killed


def command_of(process: psutil.Process) -> str:
    """The command line of a process; one that has just ended has none."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_what_cannot_be_right_is_refused_in_one_line(job: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('taskss = ["shapes_vqa"]\n')
    for given, message in (
        (("--task", "no_such_task"), "no_such_task"),
        (("--config", tmp_path / "recipe.toml"), "unknown setting 'taskss'; did you mean tasks"),
        (("--plan", tmp_path / "none.json"), "none.json"),
    ):
        status, said = job(main, *given, "--output-path", tmp_path / "out")
        assert status == 2 and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
