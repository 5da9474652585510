"""Campaigns that are disturbed: samples and cells that fail, runs that are killed, files that are damaged."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from reports.manifest import CampaignManifest, State
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.run import Stopped, one_driver
from tests.workers.campaign.fakes import FakeRunner, recipe
from tests.workers.campaign.test_campaign import campaign, last_table, tables

ROOT = Path(__file__).resolve().parents[3]


def small(output: Path, **changes: Any) -> CampaignSpec:
    return recipe(output, **{"plans": ("first@3", "last@3"), **changes})


def state(output: Path) -> State:
    return CampaignManifest.load(Folder(output)).state


class Killed(BaseException):
    """The process is gone: nobody catches it."""


def test_failing_samples_are_no_wrong_answers(tmp_path: Path) -> None:
    runner = FakeRunner(failing=frozenset({"s3", "s7"}))
    said = campaign(small(tmp_path / "a"), runner, status=3)
    assert "3 cells with failures" in said and state(tmp_path / "a") is State.PARTIAL
    assert "tiny full shapes: 2 of 60 samples failed; the first, 's3': truncated JPEG" in said
    found = tables(tmp_path / "a")
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("partial", 60, 2)}
    failed = [row for row in found["answers"] if row["error"]]
    assert len(failed) == 6 and all(row["scores"] == [] and row["prediction"] is None for row in failed)
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match"} == {58}
    assert {row["n"] for row in found["speed"]} == {58}
    campaign(small(tmp_path / "b", fail_on_error=0.05), FakeRunner(failing=runner.failing), status=0)


def test_failed_samples_are_retried_only_when_asked(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeRunner(failing=frozenset({"s3"})), status=3)
    runner = FakeRunner()
    assert "1 of 60 samples failed" in campaign(small(tmp_path), runner, status=3)
    assert runner.ran == []
    campaign(small(tmp_path, retry_failed=True), runner)
    assert len(runner.ran) == 3 and state(tmp_path) is State.COMPLETE
    campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path) == tables(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ShortVError("out of [memory]\nsecond line"), "out of [memory] second line"),
        (KeyError("score"), "KeyError: 'score'"),
        (RayError("the object store is gone"), "RayError: the object store is gone"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_cell_that_fails_in_any_way_leaves_the_others(tmp_path: Path, error: Exception, shown: str) -> None:
    def fail(plan: str, task: str) -> None:
        if plan == "first-3":
            raise error

    said = campaign(small(tmp_path), FakeRunner(before=fail), status=3)
    assert f"[2/3] tiny first-3 shapes: failed: {shown}" in said
    found = tables(tmp_path)
    assert [row["state"] for row in found["cells"]] == ["complete", "failed", "complete"]
    assert {row["plan"] for row in found["comparisons"]} == {"last-3"}
    assert "1 cell with failures" in campaign(small(tmp_path), FakeRunner(), status=3)
    campaign(small(tmp_path, fail_on_error=1.0), FakeRunner())
    runner = FakeRunner()
    campaign(small(tmp_path, retry_failed=True), runner)
    assert runner.ran == ["tiny first-3 shapes"] and state(tmp_path) is State.COMPLETE


def test_a_cell_without_any_answer_has_failed(tmp_path: Path) -> None:
    everything = frozenset(f"s{index}" for index in range(60))
    said = campaign(small(tmp_path, plans=()), FakeRunner(failing=everything), status=3)
    assert "[1/1] tiny full shapes: failed: 60 of 60 samples failed" in said
    assert {row["state"] for row in tables(tmp_path)["cells"]} == {"failed"}


def test_a_cell_whose_metrics_fail_keeps_its_answers(tmp_path: Path) -> None:
    said = campaign(small(tmp_path, plans=()), FakeRunner(unscored=True), status=3)
    assert "[1/1] tiny full shapes: failed: no judge" in said
    found = tables(tmp_path)
    assert [row["state"] for row in found["cells"]] == ["failed"] and not found["metrics"]
    assert len(found["answers"]) == 60 and {row["prediction"] for row in found["answers"]} == {"red", "blue"}
    campaign(small(tmp_path, plans=(), retry_failed=True), FakeRunner())
    assert state(tmp_path) is State.COMPLETE


def test_a_retry_that_fails_keeps_the_answers(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeRunner(failing=frozenset({"s3"})), status=3)
    before = tables(tmp_path)

    def fail(plan: str, task: str) -> None:
        raise ShortVError("no memory")

    said = campaign(small(tmp_path, retry_failed=True), FakeRunner(before=fail), status=3)
    assert "the retry failed, the earlier answers stay: no memory" in said and tables(tmp_path) == before
    everything = frozenset(f"s{index}" for index in range(60))
    campaign(small(tmp_path, retry_failed=True), FakeRunner(failing=everything), status=3)
    assert tables(tmp_path) == before


def test_a_sample_that_comes_twice_makes_the_cell_fail(tmp_path: Path) -> None:
    runner = FakeRunner()
    runner._sample = lambda model, plan, index: FakeRunner._sample(runner, model, plan, index // 2)  # type: ignore[method-assign]
    assert "sample 's0' occurs 2 times" in campaign(small(tmp_path), runner, status=3)
    assert "gave no sample" in campaign(small(tmp_path / "none"), FakeRunner(samples=0), status=3)


def test_replicas_that_do_not_start(tmp_path: Path) -> None:
    said = campaign(small(tmp_path), FakeRunner(broken=True), status=3)
    assert said.count("no replica started") == 6
    campaign(small(tmp_path, retry_failed=True), FakeRunner())


def test_a_stopped_run_continues(tmp_path: Path) -> None:
    def stop(plan: str, task: str) -> None:
        if plan == "first-3":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="the same command continues") as caught:
        campaign(small(tmp_path), FakeRunner(before=stop))
    assert caught.value.exit_status == 128 + signal.SIGTERM and state(tmp_path) is State.RUNNING
    assert [row["plan"] for row in tables(tmp_path)["cells"]] == ["full"]
    runner = FakeRunner()
    said = campaign(small(tmp_path), runner)
    assert "3 cells, 1 finished" in said and runner.ran == ["tiny first-3 shapes", "tiny last-3 shapes"]
    whole = campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path) == tables(tmp_path / "undisturbed")
    assert last_table(said).splitlines()[:-2] == last_table(whole).splitlines()[:-2]


@pytest.mark.parametrize("retry", [False, True])
def test_a_kill_at_any_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry: bool) -> None:
    """The other order of samples stands for replicas that answer in another order."""
    wanted = {"plans": ("last@3",), "retry_failed": retry}
    campaign(small(tmp_path / "whole", **wanted))
    write, writes = Folder.write_bytes, 0

    def counted(self: Folder, name: str, data: bytes) -> None:
        nonlocal writes
        if writes == 0:
            raise Killed
        writes -= 1
        write(self, name, data)

    for allowed in range(1, 60):
        output = tmp_path / str(allowed)
        if retry:
            campaign(small(output, **wanted), FakeRunner(failing=frozenset({"s1"})), status=3)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write_bytes", counted)
            writes = allowed
            try:
                campaign(small(output, **wanted), FakeRunner(reverse=True))
                break
            except Killed:
                pass
        campaign(small(output, **wanted), FakeRunner())
        assert tables(output) == tables(tmp_path / "whole")
        assert state(output) is State.COMPLETE
    assert allowed > 10


def test_damaged_files_make_the_cell_run_again(tmp_path: Path) -> None:
    campaign(small(tmp_path))
    whole = tables(tmp_path)
    records = sorted((tmp_path / "cells").iterdir())
    records[0].write_text("{")
    records[1].write_text(records[2].read_text())
    answers = tmp_path / "answers" / f"{records[2].stem}.parquet"
    answers.write_bytes(answers.read_bytes()[:-20])
    runner = FakeRunner()
    said = campaign(small(tmp_path), runner)
    assert said.count("the cell runs again") == 3 and "3 cells, 0 finished" in said
    assert tables(tmp_path) == whole
    for damage in ("[]", "{}", records[0].read_text().replace('"complete"', '"done"'), '{"schema_version": 2}'):
        records[0].write_text(damage)
        assert "3 cells, 2 finished" in campaign(small(tmp_path))
    assert tables(tmp_path) == whole


def test_two_drivers_on_one_folder_are_refused(tmp_path: Path) -> None:
    campaign(small(tmp_path))
    message = rf"is in use by process {os.getpid()} on .*; wait until it has ended"
    with one_driver(Folder(tmp_path)), pytest.raises(Refused, match=message):
        campaign(small(tmp_path))
    campaign(small(tmp_path))


def test_a_killed_process_leaves_a_folder_that_continues(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from shortv.workers.campaign.driver import run_campaign\n"
        "from tests.workers.campaign.fakes import FakeRunner, recipe\n"
        "kill = lambda plan, task: plan == 'first-3' and os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_campaign(recipe(Path(sys.argv[1]), plans=('first@3', 'last@3')), runner=FakeRunner(before=kill))"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    runner = FakeRunner()
    assert "3 cells, 1 finished" in campaign(small(tmp_path), runner)
    campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path) == tables(tmp_path / "undisturbed")


def test_a_finished_campaign_can_be_shown_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign(small(tmp_path))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shortv.workers.run._open_lock", refuse)
    monkeypatch.setattr(Folder, "write_bytes", refuse)
    assert "3 cells, 3 finished" in campaign(small(tmp_path))


def test_a_full_disk_ends_the_run_and_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Folder.write_bytes

    def full(self: Folder, name: str, data: bytes) -> None:
        if name.startswith("answers/"):
            raise ShortVError("no space left")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_bytes", full)
        with pytest.raises(ShortVError, match="no space left"):
            campaign(small(tmp_path))
    assert not (tmp_path / "cells").exists()
    campaign(small(tmp_path))


def test_every_table_is_there_when_every_cell_has_failed(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeRunner(broken=True), status=3)
    found = tables(tmp_path)
    assert all(name in found for name in TABLES) and found["comparisons"] == found["metrics"] == []
