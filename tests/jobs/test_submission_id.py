"""--print-submission-id: one id per attempt on a folder, without work; and one driver at a time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import campaign, lc_sweep
from reports.manifest import CampaignManifest, State, SweepManifest
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.spec import campaign_submission_id
from shortv.workers.run import LOCK_NAME, one_driver
from shortv.workers.sweep import driver
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.spec import sweep_submission_id
from tests.workers.campaign.fakes import FakeWorkers, campaign_spec
from tests.workers.fakes import FakeEngine, make_spec, run_units_here

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ("jobs/lc_sweep.py", "--model", "a/b", "--calibration", "gqa:20")
CAMPAIGN = ("jobs/campaign.py", "--tasks", "shapes", "--plans", "first@3,last@3")


@pytest.fixture
def printed(job: Any) -> Callable[..., str]:
    """Run a job with --print-submission-id and return what it printed."""

    def start(command: Any, *arguments: object, status: int = 0) -> str:
        found, said = job(command.main, *arguments, "--print-submission-id")
        assert found == status, said
        return str(said).strip()

    return start


@pytest.mark.parametrize("command", [SWEEP, CAMPAIGN])
def test_it_needs_neither_torch_nor_ray_and_writes_nothing(command: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert {'torch', 'ray', 'transformers'}.isdisjoint(sys.modules)"
    )
    job, *rest = command
    arguments = [job, *rest, "--output-path", str(tmp_path / "out"), "--print-submission-id"]
    script = f"import sys; sys.argv = {arguments!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prefix = "lc" if command is SWEEP else "campaign"
    name, digest, attempt = done.stdout.strip().split("-")
    assert (name, len(digest), attempt) == (prefix, 12, "1")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_what_decides_the_result(
    tmp_path: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(*more: object, out: str = "out") -> str:
        return printed(lc_sweep, *SWEEP[1:], "--output-path", tmp_path / out, *more)

    assert sweep() == sweep("--workers", "1:4", "--device", "cpu", "--stack", 2, "--fail-on-error", "0.5")
    others = {sweep("--seed", 1), sweep("--batch-size", 4), sweep("--modes", "all"), sweep(out="other")}
    assert len({sweep(), *others}) == 5
    monkeypatch.setenv("SHORTV_VERBOSE", "")
    assert sweep("--verbose") == sweep() and os.environ["SHORTV_VERBOSE"] == "1"
    monkeypatch.chdir(tmp_path)
    assert printed(lc_sweep, *SWEEP[1:], "--output-path", "out") == sweep()

    def judge(*more: object) -> str:
        return printed(campaign, *CAMPAIGN[1:], "--output-path", tmp_path / "out", *more)

    assert judge() == judge("--replicas", 3, "-b", 2, "--retry-failed", "--device", "cpu", "--num-concurrent", 9)
    assert len({judge(), judge("--seed", 1), judge("--limit", 5), judge("--plans", "first@2")}) == 4


def test_what_is_refused(tmp_path: Path, printed: Callable[..., str]) -> None:
    out = tmp_path / "out"
    arguments = (*SWEEP[1:], "--output-path", out)
    assert "--batch-size is '0'" in printed(lc_sweep, *arguments, "-b", 0, status=2)
    assert run_campaign(campaign_spec(out), workers=FakeWorkers()) == 0
    assert "of kind 'campaign'" in printed(lc_sweep, *arguments, status=2)


def fail(*_: Any) -> dict[str, Any]:
    raise ShortVError("the work on Ray failed")


def test_each_start_of_a_sweep_is_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_spec(tmp_path, samples=4)
    # A folder that holds only a lock is new.
    with one_driver(Folder(request.output_path)):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]
    first = sweep_submission_id(request)
    assert first.endswith("-1")
    monkeypatch.setattr(driver, "run_units", fail)
    for attempt in (2, 3):
        with pytest.raises(ShortVError, match="on Ray failed"):
            run_sweep(request, engine=FakeEngine())
        assert sweep_submission_id(request) == f"{first[:-2]}-{attempt}"
    monkeypatch.setattr(driver, "run_units", run_units_here)
    assert run_sweep(request, engine=FakeEngine()) == 0
    assert sweep_submission_id(request.model_copy(update={"workers": None})) == f"{first[:-2]}-4"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run_sweep(request, engine=FakeEngine()) == 0, "a finished sweep is shown"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert SweepManifest.load(Folder(request.output_path)).attempts == 3


def test_each_start_of_a_campaign_is_an_attempt(tmp_path: Path) -> None:
    asked = campaign_spec(tmp_path / "out")
    first = campaign_submission_id(asked)
    assert first.endswith("-1")
    assert run_campaign(asked, workers=FakeWorkers()) == 0
    assert campaign_submission_id(asked) == f"{first[:-2]}-2"
    assert run_campaign(asked, workers=FakeWorkers()) == 0, "a finished campaign is shown"
    assert CampaignManifest.load(Folder(asked.output_path)).attempts == 1
    more = asked.model_copy(update={"plans": (*asked.plans, "first@2")})
    assert run_campaign(more, workers=FakeWorkers()) == 0
    assert campaign_submission_id(more).endswith("-3") and campaign_submission_id(more)[:-2] != first[:-2]


def test_a_sweep_that_another_driver_finished_meanwhile_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_spec(tmp_path, samples=4)
    monkeypatch.setattr(driver, "run_units", run_units_here)
    prepare = driver.prepare

    def prepare_slowly(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        monkeypatch.setattr(driver, "prepare", prepare)
        assert run_sweep(request, engine=FakeEngine()) == 0
        monkeypatch.setattr(driver, "run_units", fail)
        return prepared

    monkeypatch.setattr(driver, "prepare", prepare_slowly)
    assert run_sweep(request, engine=FakeEngine()) == 0
    manifest = SweepManifest.load(Folder(request.output_path))
    assert manifest.state is State.COMPLETE and manifest.attempts == 1
