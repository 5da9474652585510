"""jobs/campaign.py: which settings reach the driver from flags and files, and the exit status."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.campaign import main
from jobs.common import run
from shortv.workers.campaign.spec import CampaignSpec
from tests.workers.campaign.fakes import FakeRunner

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the job with a runner that has no model; returns its status and its output."""
    runner = FakeRunner()
    monkeypatch.setattr("shortv.workers.campaign.runner.ReplicaRunner", lambda: runner)

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["campaign.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    start.runner = runner  # type: ignore[attr-defined]
    return start


def test_flags_and_a_file_start_a_campaign(job: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'plans = ["first@2"]\ntasks = ["shapes"]\noutput_path = "{tmp_path}/no"\n')
    status, output = job("--config", tmp_path / "r.toml", "--plan", "last@1,last@2", "--output_path", tmp_path / "out")
    assert status == 0 and "last-2" in output and "first-2" not in output
    assert not (tmp_path / "no").exists() and (tmp_path / "out" / "comparisons.parquet").exists()
    assert [ran.split()[-2] for ran in job.runner.ran] == ["full", "last-1", "last-2"]


def test_failures_are_status_3(job: Any, tmp_path: Path) -> None:
    job.runner.failing = frozenset({"s1"})
    arguments = ("--task", "shapes", "--output-path", tmp_path)
    assert job(*arguments)[0] == 3
    assert job(*arguments, "--fail-on-error", "0.1")[0] == 0
    job.runner.failing = frozenset()
    assert job(*arguments, "--retry-failed")[0] == 0


def test_refusals_are_status_2_and_one_line(job: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("modles = []\n")
    for arguments, message in (
        (["--config", tmp_path / "r.toml"], "unknown setting 'modles'; did you mean models"),
        ([], "--output-path"),
        (["--output-path", tmp_path / "x", "--plans", "none"], "cannot read plan"),
        (["--output-path", tmp_path / "x", "--batch-size", "0"], "--batch-size is '0'"),
        (["--nothing"], "No such option"),
    ):
        status, output = job(*arguments)
        assert status == 2 and message in output
    assert not (tmp_path / "x").exists()


def test_help_needs_neither_torch_nor_ray() -> None:
    code = "import sys, jobs.campaign\nprint({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_defaults_are_the_bundled_model_and_task(job: Any, tmp_path: Path) -> None:
    seen: list[CampaignSpec] = []
    job.runner.task = lambda name, spec: seen.append(spec) or FakeRunner().task(name, spec)
    assert job("--output-path", tmp_path)[0] == 0
    assert Path(seen[0].models[0]).resolve() == ROOT / "shortv/tiny/model" and seen[0].tasks == ("shapes_vqa",)
