"""jobs/report.py: where the page goes, what its links lead to, and its exit status."""

import contextlib
import io
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from unittest import mock

import pytest

from jobs.common import run
from jobs.report import main
from reports.store import Folder
from tests.reports.runs import make_campaign, make_sweep, sweep_manifest

ROOT = Path(__file__).resolve().parents[2]


def report(*arguments: object, status: int = 0) -> str:
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["report.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as end,
    ):
        run(main)
    assert end.value.code == status, out.getvalue()
    return out.getvalue()


def links_of(page: Path) -> set[str]:
    return set(re.findall(r'<a href="([^"#]+)"', page.read_text("utf-8")))


def test_the_page_is_written_beside_its_tables_or_links_back(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a run")
    assert report(tmp_path / "a run") == f"written to {tmp_path}/a run/report.html\n"
    page = tmp_path / "a run" / "report.html"
    assert all((page.parent / link).is_file() for link in links_of(page))
    assert [name for name in os.listdir(page.parent) if name.startswith(".")] == []
    (tmp_path / "pages").mkdir()
    report(tmp_path / "a run", "--output_path", tmp_path / "pages" / "one.html")
    assert "../a%20run/lc_layers.parquet" in links_of(tmp_path / "pages" / "one.html")
    report(tmp_path / "a run", "--output", f"{tmp_path}/pages/")
    assert (tmp_path / "pages" / "report.html").exists()


def test_the_script_runs_by_its_path(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/report.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "has no manifest.json" in done.stderr


def test_folders_and_pages_in_object_stores(tmp_path: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/run"
    local, remote = make_campaign(tmp_path / "run"), Folder(uri)
    for name in local.list():
        remote.write_bytes(name, local.read_bytes(name))
    assert report(uri) == f"written to {uri}/report.html\n"
    assert b'<a href="cells.parquet"' in remote.read_bytes("report.html")
    report(uri, "--output", tmp_path / "page.html")
    assert links_of(tmp_path / "page.html") == set()
    assert "<code>cells.parquet</code>" in (tmp_path / "page.html").read_text("utf-8")


def test_a_comparison_leaves_the_page_alone(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    make_sweep(tmp_path / "b", seed=1)
    said = report(tmp_path / "a", "--against", tmp_path / "b")
    assert said == f"written to {tmp_path}/a/report-against.html\n"
    assert not (tmp_path / "a" / "report.html").exists()
    assert "Against another sweep" in (tmp_path / "a" / "report-against.html").read_text("utf-8")


def test_a_running_sweep_is_labelled(tmp_path: Path) -> None:
    sweep_manifest(state="running", counts={}, finished=None).save(Folder(tmp_path))
    assert report(tmp_path) == f"written to {tmp_path}/report.html, of a run that is running\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "has no manifest.json; give an output folder of jobs/lc_sweep.py or jobs/campaign.py"),
        ("nosuch://bucket/run", "cannot be opened"),
        ("cut", "lc_layers.parquet is not a whole Parquet file"),
    ],
)
def test_what_is_not_a_whole_run_is_refused_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    make_sweep(tmp_path / "cut").write_bytes("lc_layers.parquet", b"PAR1")
    make_sweep(tmp_path / "whole")
    folder = name if "://" in name else tmp_path / name
    for arguments in ([folder], [tmp_path / "whole", "--against", folder]):
        said = report(*arguments, status=2)
        assert message in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_that_cannot_be_written_fails(tmp_path: Path) -> None:
    make_sweep(tmp_path / "run")
    (tmp_path / "file").write_text("")
    said = report(tmp_path / "run", "--output", tmp_path / "file" / "page.html", status=1)
    assert "could not be written" in said and said.count("\n") == 1


def test_a_relative_page_in_a_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "--output 'page.html' is relative" in report("/nowhere", "--output", "page.html", status=2)
