"""A list is quick the second time, and sees every change all the same."""

import os
from pathlib import Path
from typing import Any

import pytest

from reports.service import summary
from reports.service.files import Files
from reports.service.runs import find_runs
from reports.service.summary import Summaries
from reports.service.tree import LocalTree
from tests.reports.runs import make_sweep
from tests.reports.service.folders import change_manifest, make_campaign, make_training

LONG_AGO = (1e9, 1e9)


def settle(root: Path) -> None:
    """Make all files old enough to be remembered."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, LONG_AGO)


@pytest.fixture(name="looked_at")
def _looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose manifests were read."""
    names: list[str] = []
    read = summary.read_run
    monkeypatch.setattr(summary, "read_run", lambda files, run: names.append(run[-1]) or read(files, run))
    return names


def test_a_run_is_looked_at_again_only_when_a_file_of_it_changes(tmp_path: Path, looked_at: list[str]) -> None:
    make_sweep(tmp_path / "a")
    make_campaign(tmp_path / "c")
    make_training(tmp_path / "t")
    settle(tmp_path)
    summaries = Summaries(Files(LocalTree(str(tmp_path))))

    def problems() -> dict[str, Any]:
        looked_at.clear()
        found = [summaries.of(found) for found in find_runs(LocalTree(str(tmp_path))).found]
        return {run.shape["id"]: list(run.problems) for run in found}

    assert problems() == {"a": [], "c": [], "t": []} and sorted(looked_at) == ["a", "c", "t"]
    assert problems() == {"a": [], "c": [], "t": []} and looked_at == []
    (tmp_path / "a" / "plans" / "two.json").write_text("{")
    (tmp_path / "c" / "answers" / f"{'0' * 64}.parquet").unlink()
    settle(tmp_path)
    found = problems()
    assert "JSON" in found["a"][0] and "missing" in found["c"][0] and sorted(looked_at) == ["a", "c"]
    change_manifest(tmp_path / "t", counts={"steps": 9, "samples": 1, "errors": 0})
    # A file that was written a moment ago may be written again with the same time.
    assert "9 steps" in problems()["t"][0] and "9 steps" in problems()["t"][0] and looked_at == ["t"]
