"""jobs/lc_sweep.py: refusals, and one script in three ways: here, on several nodes, submitted as a job with a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet as pq

from jobs.lc_sweep import main
from reports.store import Folder
from tests.tiny_model import TINY
from tests.workers.fakes import make_samples, write_calibration

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--model", TINY / "model", "--calibration", TINY / "calibration.parquet", "--limit", 8, "-b", 4]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--modes", "freeze-visuals"), "unknown mode"),
        (("--modes", "full"), "changes nothing"),
        (("--workers", "4:2"), "--workers"),
        (("--batch_size", "0"), "--batch-size"),
        (("--limit", "1.5"), "--limit"),
        (("--limit", "nan"), "--limit"),
        (("--fail-on-error", "2"), "--fail-on-error"),
        (("--gpus_per_worker", "1.5"), "--gpus-per-worker"),
        (("--seed", "9" * 401), "--seed"),
        (("--workers", "9" * 5000), "--workers"),
        (("--include-path", "a\0b"), "--include-path"),
        (("--chat-template", "/no/such/file"), "chat template"),
        (("--calibration", "/no/missing.parquet"), "missing.parquet"),
        (("--calibration", TINY / "calibration.parquet"), "more than one calibration source"),
        (("--model", "no/such-model"), "no/such-model"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(
    job: Any, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    status, said = job(main, *ARGUMENTS, "--output_path", tmp_path / "out", *arguments)
    assert status == 2 and reason in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_and_folders_that_cannot_be_used_are_refused(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*arguments: object) -> str:
        status, said = job(main, "--output-path", tmp_path / "out", *arguments)
        assert status == 2 and said.count("\n") == 1
        return str(said)

    pq.write_table(pa.table({"sample_id": ["a"]}), tmp_path / "lacking.parquet")
    pq.write_table(pa.table({"sample_id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("lacking", "empty", "text"):
        arguments = ("--model", TINY / "model", "--calibration", tmp_path / f"{name}.parquet")
        assert f"{name}.parquet" in refusal(*arguments)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    calibration = write_calibration(tmp_path / "calibration.parquet", make_samples(2))
    said = refusal("--model", tmp_path / "bert", "--calibration", calibration)
    assert "bert" in said and "llava" in said and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refusal(*ARGUMENTS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "relative" in refusal(*ARGUMENTS, "--output-path", "runs/demo")


def sweep(output: Path, *more: str, env: Mapping[str, str] | None = None) -> str:
    """Run the job as a user does, and return what it said."""
    command = [sys.executable, "jobs/lc_sweep.py", *map(str, ARGUMENTS), "--output-path", str(output), *more]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same(found: Path, wanted: Path) -> None:
    """The same ranks, and LC within the tolerance of another batch size."""
    tables = (Folder(str(output)).read_table("lc_layers").to_pylist() for output in (found, wanted))
    for row, other in zip(*tables, strict=True):
        assert [row[name] for name in ("mode", "layer", "rank")] == [other[name] for name in ("mode", "layer", "rank")]
        assert abs(row["mean"] - other["mean"]) <= 1e-7 + 1e-5 * other["mean"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A sweep in this process by one worker on this machine."""
    output = tmp_path_factory.mktemp("here") / "out"
    done = CliRunner().invoke(main, [*map(str, ARGUMENTS), "--output-path", str(output)], standalone_mode=False)
    assert done.return_value == 0, done.exception
    assert "Layer Contribution" in done.output and "FLOPs ratio" in done.output
    return output


@pytest.mark.ray
def test_on_this_machine_then_again(here: Path, job: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.name != ".driver.lock"}
    status, said = job(main, *ARGUMENTS, "--output-path", here)
    assert status == 0 and "Layer Contribution" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.ray
@pytest.mark.slow
def test_on_several_nodes(tmp_path: Path, here: Path) -> None:
    """A cluster of three nodes: a head without a CPU, and two nodes of two."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        for workers in (2, 4):
            output = tmp_path / str(workers)
            sweep(output, "--workers", str(workers), env={"RAY_ADDRESS": cluster.address})
            assert json.loads((output / "manifest.json").read_text())["details"]["workers"] == workers
            assert_same(output, here)
    finally:
        cluster.shutdown()


@pytest.fixture
def head(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[dict[str, str]]:
    """A head node of one CPU that requires a token; yields the environment of its clients."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # The cluster of the other tests holds the agent's usual port, and a head without an agent takes no job.
    port, dashboard, agent = free_port(), free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # A socket's path may have 107 characters, and pytest's folders are long.
    scratch = Path(f"/tmp/sv{os.getpid()}")
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true", "--disable-usage-stats"]
    process = subprocess.Popen(
        [*command, f"--temp-dir={scratch}"],
        env=env,
        stdout=(tmp_path / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(url + "/api/version", token.read_text(), process)
        yield env | {"RAY_API_SERVER_ADDRESS": url}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # Processes of the head that was started with this scratch folder; other heads have other folders.
        for one in psutil.process_iter(["cmdline"]):
            if any(f"{scratch}/" in part for part in one.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
        process.kill()
        process.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


def wait_for(url: str, token: str, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no Ray head answers at {url}")


@pytest.mark.ray
@pytest.mark.slow
def test_submitted_as_a_job(tmp_path: Path, head: dict[str, str], here: Path) -> None:
    submit = ["ray", "job", "submit", "--working-dir", ".", "--entrypoint-num-cpus", "1", "--", "python"]
    # The job finds the model in its own copy of the working directory.
    given = [os.path.relpath(one, ROOT) if isinstance(one, Path) else str(one) for one in ARGUMENTS]
    command = [*submit, "jobs/lc_sweep.py", *given, "--workers", "4", "--output-path", str(tmp_path / "out")]
    deadline = time.monotonic() + 600
    while True:
        done = subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True, timeout=900)
        # The head answers some seconds before its agent takes jobs.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 4 workers fit" in done.stdout
    assert_same(tmp_path / "out", here)
