"""The one script, three ways: on this machine, on a cluster of several nodes, and submitted as a job with a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from reports.store import Folder

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
MODEL = "shortv/tiny/model"
CALIBRATION = "shortv/tiny/calibration.parquet"


def sweep(output: Path, *more: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the job as a user does."""
    return subprocess.run(
        [sys.executable, "jobs/lc_sweep.py", *arguments(output), *more],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )


def arguments(output: Path) -> list[str]:
    return ["--model", MODEL, "--calibration", CALIBRATION, "--output-path", str(output), "--limit", "8", "-b", "4"]


def layers(output: Path) -> list[tuple[str, int, int, float]]:
    rows = Folder(str(output)).read_table("lc_layers").to_pylist()
    return [(row["mode"], row["layer"], row["rank"], row["mean"]) for row in rows]


def assert_same(found: Path, wanted: Path) -> None:
    for (*place, mean), (*other, reference) in zip(layers(found), layers(wanted), strict=True):
        assert place == other
        assert abs(mean - reference) <= 1e-7 + 1e-5 * reference


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep on this machine by one worker."""
    output = tmp_path_factory.mktemp("embedded") / "out"
    done = sweep(output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Layer Contribution" in done.stdout and "FLOPs ratio" in done.stdout
    return output


def test_on_this_machine_then_again(embedded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in embedded.rglob("*")}
    again = sweep(embedded)
    assert again.returncode == 0 and "Layer Contribution" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in embedded.rglob("*")} == before


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """The address of a cluster of three nodes: a head without a CPU, and two nodes of two."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_on_several_nodes(tmp_path: Path, nodes: str, embedded: Path, workers: int) -> None:
    done = sweep(tmp_path / "out", "--workers", str(workers), env={"RAY_ADDRESS": nodes})
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["details"]["workers"] == workers
    assert_same(tmp_path / "out", embedded)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of one CPU that requires a token; yields the environment of its clients."""
    home = tmp_path_factory.mktemp("head")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # A socket's path may have 107 characters, and pytest's folders are long.
    scratch = Path(f"/tmp/sv{os.getpid()}")
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", f"--port={port}", f"--dashboard-port={dashboard}"]
    # The cluster of the other tests holds the agent's usual port, and a head without an agent takes no job.
    command += [
        f"--dashboard-agent-listen-port={free_port()}",
        "--include-dashboard=true",
        "--disable-usage-stats",
        f"--temp-dir={scratch}",
    ]
    log = (home / "head.log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(url + "/api/version", token.read_text(), process)
        yield env | {"RAY_API_SERVER_ADDRESS": url}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in processes_of(scratch):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
def test_submitted_as_a_job(tmp_path: Path, head: dict[str, str], embedded: Path) -> None:
    submit = ["ray", "job", "submit", "--working-dir", ".", "--entrypoint-num-cpus", "1", "--", "python"]
    output = tmp_path / "out"
    command = [*submit, "jobs/lc_sweep.py", *arguments(output), "--workers", "4"]
    deadline = time.monotonic() + 150
    while True:
        done = subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True, timeout=280)
        # The head answers some seconds before its agent takes jobs.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 4 workers fit" in done.stdout
    assert_same(output, embedded)


def processes_of(scratch: Path) -> list[int]:
    """Process ids of the head that was started with this scratch folder; other heads have other folders."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(scratch) + "/" in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, token: str, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no Ray head answers at {url}")
