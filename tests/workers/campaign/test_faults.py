"""Campaigns with samples and cells that fail, runs that are killed, and files that are damaged."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from reports.manifest import CampaignManifest, State
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.run import Stopped
from tests.workers.campaign.fakes import FakeRunner, campaign, campaign_spec, last_table, tables

EVERY_SAMPLE = frozenset(f"s{index}" for index in range(60))


def small(output: Path, **changes: Any) -> CampaignSpec:
    return campaign_spec(output, **{"plans": ("first@3", "last@3"), **changes})


def state(output: Path) -> State:
    return CampaignManifest.load(Folder(output)).state


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_failed_samples_are_not_wrong_answers_and_are_retried_on_request(tmp_path: Path) -> None:
    runner = FakeRunner(failing=frozenset({"s3", "s7"}))
    output = campaign(small(tmp_path / "a"), runner, status=3)
    assert "3 cells with failures" in output and state(tmp_path / "a") is State.PARTIAL
    assert "tiny full shapes: 2 of 60 samples failed; the first, 's3': truncated JPEG" in output
    found = tables(tmp_path / "a")
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("partial", 60, 2)}
    failed = [row for row in found["answers"] if row["error"]]
    assert len(failed) == 6 and all(row["scores"] == [] and row["prediction"] is None for row in failed)
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match"} == {58}
    assert {row["n"] for row in found["speed"]} == {58}
    campaign(small(tmp_path / "a", fail_on_error=0.05), runner, status=0)
    runner = FakeRunner()
    assert "2 of 60 samples failed" in campaign(small(tmp_path / "a"), runner, status=3)
    assert runner.ran == []
    campaign(small(tmp_path / "a", retry_failed=True), runner)
    assert len(runner.ran) == 3 and state(tmp_path / "a") is State.COMPLETE
    campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path / "a") == tables(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ShortVError("out of [memory]\nsecond line"), "out of [memory] second line"),
        (RayError("the object store is gone"), "RayError: the object store is gone"),
    ],
)
def test_a_cell_that_fails_in_any_way_leaves_the_others(tmp_path: Path, error: Exception, shown: str) -> None:
    def fail(plan: str, task: str) -> None:
        if plan == "first-3":
            raise error

    output = campaign(small(tmp_path), FakeRunner(before=fail), status=3)
    assert f"[2/3] tiny first-3 shapes: failed: {shown}" in output
    found = tables(tmp_path)
    assert [row["state"] for row in found["cells"]] == ["complete", "failed", "complete"]
    assert {row["plan"] for row in found["comparisons"]} == {"last-3"}
    assert "1 cell with failures" in campaign(small(tmp_path), FakeRunner(), status=3)
    campaign(small(tmp_path, fail_on_error=1.0), FakeRunner())
    runner = FakeRunner()
    campaign(small(tmp_path, retry_failed=True), runner)
    assert runner.ran == ["tiny first-3 shapes"] and state(tmp_path) is State.COMPLETE


@pytest.mark.parametrize(
    ("runner", "message", "answers"),
    [
        (FakeRunner(failing=EVERY_SAMPLE), "60 of 60 samples failed", 60),
        (FakeRunner(unscored=True), "no judge", 60),
        (FakeRunner(broken=True), "no replica started", 0),
        (FakeRunner(samples=0), "has no samples", 0),
    ],
)
def test_cells_without_scores_have_failed_and_can_be_retried(
    tmp_path: Path, runner: FakeRunner, message: str, answers: int
) -> None:
    output = campaign(small(tmp_path, plans=()), runner, status=3)
    assert "[1/1] tiny full shapes: failed: " in output and message in output
    found = tables(tmp_path)
    assert all(name in found for name in TABLES) and found["comparisons"] == []
    assert [row["state"] for row in found["cells"]] == ["failed"] and len(found["answers"]) == answers
    campaign(small(tmp_path, plans=(), retry_failed=True), FakeRunner())
    assert state(tmp_path) is State.COMPLETE


def test_names_and_messages_from_outside_do_not_control_the_terminal(tmp_path: Path) -> None:
    def fail(plan: str, task: str) -> None:
        raise ValueError("\x1b[31m[/x]\nError: forged")

    output = campaign(small(tmp_path, models=("a\x1b[31m[/x]",)), FakeRunner(before=fail), status=3)
    assert "\x1b" not in output and "a\\x1b[31m[/x] on shapes" in output
    assert not any(line.startswith("Error: forged") for line in output.splitlines())


def test_a_retry_that_fails_keeps_the_answers(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeRunner(failing=frozenset({"s3"})), status=3)
    before = tables(tmp_path)

    def fail(plan: str, task: str) -> None:
        raise ShortVError("no memory")

    output = campaign(small(tmp_path, retry_failed=True), FakeRunner(before=fail), status=3)
    assert "the retry failed, the earlier answers stay: no memory" in output and tables(tmp_path) == before
    campaign(small(tmp_path, retry_failed=True), FakeRunner(failing=EVERY_SAMPLE), status=3)
    assert tables(tmp_path) == before


def test_a_stopped_run_continues(tmp_path: Path) -> None:
    def stop(plan: str, task: str) -> None:
        if plan == "first-3":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="the same command continues") as caught:
        campaign(small(tmp_path), FakeRunner(before=stop))
    assert caught.value.exit_status == 128 + signal.SIGTERM and state(tmp_path) is State.RUNNING
    assert [row["plan"] for row in tables(tmp_path)["cells"]] == ["full"]
    runner = FakeRunner()
    output = campaign(small(tmp_path), runner)
    assert "3 cells, 1 finished" in output and runner.ran == ["tiny first-3 shapes", "tiny last-3 shapes"]
    assert CampaignManifest.load(Folder(tmp_path)).attempts == 2
    whole = campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path) == tables(tmp_path / "undisturbed")
    assert last_table(output).splitlines()[:-2] == last_table(whole).splitlines()[:-2]


@pytest.mark.parametrize("retry", [False, True])
def test_a_kill_at_any_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry: bool) -> None:
    """The reversed order of samples stands for replicas that answer in another order."""
    wanted = {"plans": ("last@3",), "retry_failed": retry}
    campaign(small(tmp_path / "whole", **wanted))
    write, writes = Folder.write_bytes, 0

    def counted(self: Folder, name: str, data: bytes) -> None:
        nonlocal writes
        if writes == 0:
            raise Killed
        writes -= 1
        write(self, name, data)

    if retry:
        campaign(small(tmp_path / "failed", **wanted), FakeRunner(failing=frozenset({"s1"})), status=3)
    for allowed in range(1, 60):
        output = tmp_path / str(allowed)
        if retry:
            shutil.copytree(tmp_path / "failed", output)
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
    output = campaign(small(tmp_path), FakeRunner())
    assert output.count("the cell runs again") == 3 and "3 cells, 0 finished" in output
    assert tables(tmp_path) == whole
    for damage in ("[]", "{}", records[0].read_text().replace('"complete"', '"done"'), '{"schema_version": 2}'):
        records[0].write_text(damage)
        assert "3 cells, 2 finished" in campaign(small(tmp_path))
    assert tables(tmp_path) == whole


def test_a_finished_campaign_can_be_shown_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign(small(tmp_path))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shortv.workers.run._open_lock", refuse)
    monkeypatch.setattr(Folder, "write_bytes", refuse)
    assert "3 cells, 3 finished" in campaign(small(tmp_path))


def test_a_full_disk_ends_the_run_and_fails_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
