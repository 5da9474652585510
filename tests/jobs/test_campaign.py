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
from jobs.common import run
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

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "shortv/tiny/model"


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


def arguments(output: Path, *plans: str, more: tuple[str, ...] = ()) -> list[str]:
    return ["--plans", ",".join(plans), "--limit", "40", "--output-path", str(output), *more]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the job in this process, on its Ray; gives the status and what it said."""
    monkeypatch.chdir(ROOT)

    def start(*given: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["campaign.py", *given])
        with pytest.raises(SystemExit) as ended:
            run(main)
        said = capsys.readouterr()
        # The Ray of these tests, unlike that of the job, says on stderr what Serve does.
        return int(ended.value.code or 0), said.err if ended.value.code else said.out

    return start


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, plans: list[str]) -> Path:
    """A campaign with one plan in a process of its own, stopped after its first cell as `ray job stop` does it."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    command = [sys.executable, "jobs/campaign.py", *arguments(output, plans[0])]
    log = output.parent / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 150
        while "[1/2]" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
    finally:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    # All that its user has read.
    first, second, last = log.read_text().splitlines()
    assert first == "2 cells, 0 finished" and second.startswith("[1/2] shortv/tiny/model full shapes_vqa: exact_match")
    assert last.startswith("Error: stopped before the end; what is finished is kept")
    return output


def test_a_stopped_campaign_continues_repeats_itself_and_takes_another_plan_while_a_replica_dies(
    stopped: Path, plans: list[str], job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = job(*arguments(stopped, plans[0]))
    assert status == 0 and said.startswith("2 cells, 1 finished\n[2/2] "), said
    # A finished campaign is shown again and left as it is.
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.name != ".driver.lock"}
    status, again = job(*arguments(stopped, plans[0]))
    assert status == 0 and again.startswith("2 cells, 2 finished\n")
    assert again.partition("\nresults in")[0].splitlines()[1:] == said.partition("\nresults in")[0].splitlines()[2:]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    earlier, killed = answers(stopped), kill_a_replica_after(8, monkeypatch)
    more = ("--replicas", "2", "--batch-size", "4", "--num-concurrent", "12")
    status, said = job(*arguments(stopped, *plans, more=more))
    assert status == 0 and said.count(" samples in ") == 1 and "3 cells, 2 finished" in said, said
    assert killed == [2]
    found = answers(stopped)
    assert {name: rows for name, rows in found.items() if name != "exit-1"} == earlier
    cells = Folder(str(stopped)).read_table("cells").to_pylist()
    assert [row["plan"] for row in cells] == ["full", "last-3", "exit-1"]
    assert all((row["state"], row["n"], row["errors"]) == ("complete", 40, 0) for row in cells)
    # None is missing, none counted twice, and each is what the model says in one process.
    for plan in (None, *map(Plan.load, plans)):
        name = plan.name if plan else "full"
        assert [row["prediction"] for row in found[name]] == in_process(plan), name
    assert found["exit-1"] != found["full"]


def kill_a_replica_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill one replica when so many questions have their answer; the list tells how many replicas there were."""
    advance, told, killed = SampleProgress.advance, [], []

    def advance_and_kill(self: SampleProgress, *given: int) -> None:
        advance(self, *given)
        told.append(1)
        if len(told) == count:
            children = psutil.Process().children(recursive=True)
            replicas = [one for one in children if "ServeReplica:shortv-campaign" in " ".join(one.cmdline())]
            os.kill(replicas[0].pid, signal.SIGKILL)
            killed.append(len(replicas))

    monkeypatch.setattr(SampleProgress, "advance", advance_and_kill)
    return killed


def answers(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The answers of each plan without their times."""
    folder = Folder(str(output))
    return {
        cell["plan"]: [
            {name: value for name, value in row.items() if not name.endswith("_ms")}
            for row in folder.read_table(f"answers/{cell['cell']}").to_pylist()
        ]
        for cell in folder.read_table("cells").to_pylist()
    }


def in_process(plan: Plan | None) -> list[str]:
    """The answers of transformers' generate to the questions of the task."""
    loaded = bundled()
    texts = []
    with executing(loaded.model, plan.modes if plan else (Mode.FULL,) * 8):
        for instance in (benchmark := Benchmark("shapes_vqa", limit=40)).instances:
            request = Conversation(instance, benchmark.documents).request()
            arguments = {"do_sample": False, "max_new_tokens": request.sampling.max_tokens}
            prompt = prompt_of(loaded, request.messages)
            texts.append(generate(loaded, [prompt], arguments, request.sampling.stop)[0].text)
    return texts


def test_what_cannot_be_right_is_refused_in_one_line(job: Any, tmp_path: Path, plans: list[str]) -> None:
    (tmp_path / "recipe.toml").write_text('taskss = ["shapes_vqa"]\n')
    for given, message in (
        (("--task", "no_such_task"), "no_such_task"),
        (("--config", str(tmp_path / "recipe.toml")), "unknown setting 'taskss'; did you mean tasks"),
        (("--plan", str(tmp_path / "none.json")), "none.json"),
    ):
        status, said = job(*given, "--output-path", str(tmp_path / "out"))
        assert status == 2 and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
