"""Campaigns with samples and cells that fail, runs that are killed, and files that are damaged."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from reports.manifest import CampaignManifest, State
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.producer import ProducerLost
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import Unit
from shortv.workers.run import Stopped
from tests.workers.campaign.fakes import FakeWorkers, campaign, campaign_spec, last_table, tables

EVERY_SAMPLE = frozenset(range(60))


def small(output: Path, **changes: Any) -> CampaignSpec:
    return campaign_spec(output, **{"plans": ("first@3", "last@3"), **changes})


def state(output: Path) -> State:
    return CampaignManifest.load(Folder(output)).state


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_failed_samples_are_not_wrong_answers_and_are_retried_on_request(tmp_path: Path) -> None:
    workers = FakeWorkers(failing=frozenset({3, 7}))
    output = campaign(small(tmp_path / "a"), workers, status=3)
    assert "3 cells with failures" in output and state(tmp_path / "a") is State.PARTIAL
    assert "tiny full shapes: 2 of 60 samples failed; the first, 's3': truncated JPEG" in output
    found = tables(tmp_path / "a")
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("partial", 60, 2)}
    failed = [row for row in found["answers"] if row["error"]]
    assert len(failed) == 6 and all(row["scores"] == [] and row["prediction"] is None for row in failed)
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match"} == {58}
    assert {row["n"] for row in found["speed"]} == {58}
    campaign(small(tmp_path / "a", fail_on_error=0.05), workers, status=0)
    workers = FakeWorkers()
    assert "2 of 60 samples failed" in campaign(small(tmp_path / "a"), workers, status=3)
    assert workers.ran == []
    campaign(small(tmp_path / "a", retry_failed=True), workers)
    assert workers.units == [(2, 3)] and state(tmp_path / "a") is State.COMPLETE
    campaign(small(tmp_path / "undisturbed"))
    assert tables(tmp_path / "a") == tables(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ShortVError("no [data]\nsecond line"), "no [data] second line"),
        (RayError("the object store is gone"), "RayError: the object store is gone"),
    ],
)
def test_a_unit_that_fails_in_any_way_leaves_the_others(tmp_path: Path, error: Exception, shown: str) -> None:
    def fail(unit: Unit) -> None:
        if 64 in unit.docs:
            raise error

    output = campaign(small(tmp_path), FakeWorkers(samples=150, before=fail), status=3)
    assert f"64 of 150 samples have no answer: {shown}" in output
    found = tables(tmp_path)
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("partial", 86, 0)}
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match"} == {86}
    campaign(small(tmp_path, fail_on_error=0.5), FakeWorkers(samples=150, before=fail))
    # What was not asked is asked by the same command.
    workers = FakeWorkers(samples=150)
    campaign(small(tmp_path), workers)
    assert workers.units == [(64, 3)] and state(tmp_path) is State.COMPLETE


def test_a_unit_whose_producer_dies_runs_again_and_the_document_that_kills_it_is_found(tmp_path: Path) -> None:
    deaths = Counter[tuple[int, ...]]()

    def die(unit: Unit) -> None:
        deaths[unit.docs] += 1
        # Document 75 is with producers that others end, until it is tried again at the end.
        if 70 in unit.docs or deaths[unit.docs] < 2 or (unit.docs == (75,) and deaths[unit.docs] <= 3):
            raise ProducerLost("ActorDiedError")

    output = campaign(small(tmp_path), FakeWorkers(samples=150, before=die), status=3)
    assert "1 of 150 samples failed; the first, 's70': answer: lost: 3 producers died with the document" in output
    found = tables(tmp_path)
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("partial", 150, 1)}
    assert [row["doc"] for row in found["answers"] if row["error"]] == [70] * 3
    assert sum(count for docs, count in deaths.items() if 70 in docs) <= 12
    pairs = [(row["cell"], row["doc"]) for row in Folder(tmp_path).read_tables("answers").to_pylist()]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    ("workers", "message", "answers"),
    [
        (FakeWorkers(failing=EVERY_SAMPLE), "60 of 60 samples failed", 60),
        (FakeWorkers(unscored=True), "no judge", 60),
        (FakeWorkers(broken=True), "no replica started", 0),
        (FakeWorkers(samples=0), "has no samples", 0),
    ],
)
def test_cells_without_scores_have_failed_and_can_be_retried(
    tmp_path: Path, workers: FakeWorkers, message: str, answers: int
) -> None:
    output = campaign(small(tmp_path, plans=()), workers, status=3)
    assert ("[1/1] tiny full shapes: failed: " in output or not workers.samples) and message in output
    found = tables(tmp_path)
    assert all(name in found for name in TABLES) and found["comparisons"] == []
    assert [row["state"] for row in found["cells"]] == ["failed"] and len(found["answers"]) == answers
    campaign(small(tmp_path, plans=(), retry_failed=True), FakeWorkers())
    assert state(tmp_path) is State.COMPLETE


def test_names_and_messages_from_outside_do_not_control_the_terminal(tmp_path: Path) -> None:
    def fail(unit: Unit) -> None:
        raise ValueError("\x1b[31m[/x]\nError: forged")

    output = campaign(small(tmp_path, models=("a\x1b[31m[/x]",)), FakeWorkers(before=fail), status=3)
    assert "\x1b" not in output and "a\\x1b[31m[/x] on shapes" in output
    assert not any(line.startswith("Error: forged") for line in output.splitlines())


def test_a_retry_that_fails_keeps_the_answers(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeWorkers(failing=frozenset({3})), status=3)
    before = tables(tmp_path)

    def fail(unit: Unit) -> None:
        raise ShortVError("no memory")

    workers = FakeWorkers(before=fail)
    campaign(small(tmp_path, retry_failed=True), workers, status=3)
    campaign(small(tmp_path, retry_failed=True), FakeWorkers(failing=EVERY_SAMPLE), status=3)
    assert tables(tmp_path) == before


def test_a_stopped_run_continues(tmp_path: Path) -> None:
    def stop(unit: Unit) -> None:
        if unit.task.name == "others":
            os.kill(os.getpid(), signal.SIGTERM)

    both = small(tmp_path, tasks=("shapes", "others"))
    with pytest.raises(Stopped, match="the same command continues") as caught:
        campaign(both, FakeWorkers(samples=150, before=stop))
    assert caught.value.exit_status == 128 + signal.SIGTERM and state(tmp_path) is State.RUNNING
    kept = len(Folder(tmp_path).read_tables("answers"))
    workers = FakeWorkers(samples=150)
    output = campaign(both, workers)
    assert len(workers.asked) == 6 * 150 - kept and len(set(workers.asked)) == len(workers.asked)
    assert CampaignManifest.load(Folder(tmp_path)).attempts == 2
    whole = campaign(small(tmp_path / "undisturbed", tasks=both.tasks), FakeWorkers(samples=150))
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
        campaign(small(tmp_path / "failed", **wanted), FakeWorkers(failing=frozenset({1})), status=3)
    for allowed in range(1, 60):
        output = tmp_path / str(allowed)
        if retry:
            shutil.copytree(tmp_path / "failed", output)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write_bytes", counted)
            writes = allowed
            try:
                campaign(small(output, **wanted), FakeWorkers(reverse=True))
                break
            except BaseException as error:
                assert "Killed" in repr(error)
        campaign(small(output, **wanted), FakeWorkers())
        assert tables(output) == tables(tmp_path / "whole")
        assert state(output) is State.COMPLETE
    assert allowed > 10


def test_damaged_parts_are_set_aside_and_asked_again(tmp_path: Path) -> None:
    campaign(small(tmp_path), FakeWorkers(samples=150))
    whole = tables(tmp_path)
    first, second, third = sorted((tmp_path / "answers").iterdir())
    cut = first.read_bytes()[:-20]
    first.write_bytes(cut)
    second.write_bytes((tmp_path / "cells.parquet").read_bytes())
    workers = FakeWorkers(samples=150)
    output = campaign(small(tmp_path), workers)
    assert output.count("what it held is asked again") == 2 and "3 cells, 0 finished" in output
    assert workers.units == [(64, 3)] * 2 and tables(tmp_path) == whole
    assert (tmp_path / "damaged" / "answers" / first.name).read_bytes() == cut
    assert "3 cells, 3 finished" in campaign(small(tmp_path), FakeWorkers(samples=150))
    # Answers of another recipe stay, and count for nothing here.
    campaign(small(tmp_path / "other", seed=1), FakeWorkers(samples=150))
    shutil.copy(tmp_path / "other" / "answers" / third.name, tmp_path / "answers" / "part-000009.parquet")
    assert "3 cells, 3 finished" in campaign(small(tmp_path), FakeWorkers(samples=150))
    assert tables(tmp_path)["cells"] == whole["cells"]


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
    assert not (tmp_path / "answers").exists()
    campaign(small(tmp_path))
