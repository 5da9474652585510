"""Nobody reaches a file outside the root, a hidden one, or anything without a right to it."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.reports.runs import make_sweep
from tests.reports.service.asking import HTML, ask, ask_all, listed

SECRET = "Hildegard"


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    """A root with one run, and beside the root another run that nobody may see."""
    make_sweep(tmp_path / "root" / "a")
    make_sweep(tmp_path / "outside")
    (tmp_path / "secret.parquet").write_bytes((tmp_path / "outside" / "samples.parquet").read_bytes())
    (tmp_path / "root" / "a" / ".driver.lock").write_text(SECRET)
    (tmp_path / "root" / "a" / "progress").mkdir()
    (tmp_path / "root" / "a" / "progress" / "samples.parquet").write_bytes(b"x")
    (tmp_path / "root" / "a" / ".samples.parquet.0123456789abcdef.shortv-tmp").write_text(SECRET)
    (tmp_path / "root" / "a" / "notes.parquet").write_text(SECRET)
    (tmp_path / "root" / "loose.json").write_text(SECRET)
    return tmp_path / "root"


def refused(root: Path, paths: list[str]) -> None:
    for path, response in zip(paths, ask_all(root, [("GET", path, {}) for path in paths]), strict=True):
        assert response.status_code == 404, path
        assert response.json()["error"]["code"] in ("not_found", "no_route", "no_page")
        assert SECRET not in response.text and "x:y" not in str(response.headers)


DOTS = ("..", "%2e%2e", ".%2e", "%252e%252e", "%c0%ae%c0%ae", "..%00", "...", "%2e%2e%5c", "..\\..", "%5c..")
TAILS = ("outside/manifest.json", "outside/tables/samples.parquet", "secret.parquet", "outside/")
HEADS = ("/runs/", "/runs/a/", "/runs/a/tables/", "/runs/a/tables/lc_samples/", "/runs/a/plans/", "/")


def test_no_way_leads_up(root: Path) -> None:
    ups = ["/".join([dots] * depth) for dots in DOTS for depth in (1, 2, 3)]
    refused(root, [f"{head}{up}/{tail}" for head in HEADS for up in ups for tail in TAILS])


def test_no_absolute_path_is_one(root: Path) -> None:
    paths = ["/runs//etc/passwd", "/runs/file:%2f%2f/etc/passwd", "/runs/a/tables//etc/passwd"]
    for slash in ("/", "%2f", "//", "%252f", "\\", "%5c"):
        outside = str(root.parent / "outside").replace("/", slash)
        paths += [f"/runs/{outside}/manifest.json", f"/runs/a/tables/{outside}/samples.parquet"]
        paths += [f"/runs/a/{slash}/samples", f"/{outside}/manifest.json", f"/runs{slash}{slash}a/manifest.json"]
    refused(root, paths)


NO_RESULTS = """
    .driver.lock progress progress/ progress/samples.parquet tables/progress/samples.parquet tables/notes.parquet
    notes.parquet tables/nothing samples tables/ plans plans/ plans/x .samples.parquet.0123456789abcdef.shortv-tmp
    tables/.samples.parquet plans/.two.json plans/two%00.json plans/two.json/ tables/samples.parquet/ plans/two.json%00
    tables/lc_samples/x/part-00000.parquet tables/lc_samples/part-00000 tables/lc_samples/.part-00000.parquet
    manifest.json/x tables/%0d%0ax:y
"""


def test_what_is_not_a_result_is_not_there(root: Path) -> None:
    long = ("x" * 3000 + ".parquet", "tables/lc_samples/" + "%c3%a9" * 200 + ".parquet", "plans/" + "x" * 300 + ".json")
    refused(root, [f"/runs/a/{path}" for path in (*NO_RESULTS.split(), *long)])


def test_links_are_named_and_never_followed(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "linked-run").symlink_to(outside)
    (root / "inside-run").symlink_to(root / "a")
    make_sweep(root / "b")
    make_sweep(root / "c")
    (root / "c" / "manifest.json").unlink()
    (root / "c" / "manifest.json").symlink_to(outside / "manifest.json")
    for name in ("samples.parquet", "plans/two.json", "report.html"):
        (root / "b" / name).unlink(missing_ok=True)
        (root / "b" / name).symlink_to(outside / name)
    (root / "b" / "answers").symlink_to(outside / "lc_samples")
    (root / "b" / "lc_samples" / "part-00009.parquet").symlink_to(outside / "lc_samples" / "part-00000.parquet")
    runs = listed(root)
    assert "symbolic link" in runs["linked-run"]["problems"][0] and "symbolic link" in runs["inside-run"]["problems"][0]
    assert "symbolic link" in runs["c"]["problems"][0] and "models" not in runs["c"]
    assert sum("symbolic link" in problem for problem in runs["b"]["problems"]) == 5
    asked = ["linked-run/", "linked-run/manifest.json", "inside-run/manifest.json", "linked-run/tables/samples.parquet"]
    asked += ["b/tables/samples.parquet", "b/tables/answers/part-00000.parquet", "b/tables/answers", "b/report.html"]
    asked += ["b/", "b/tables/lc_samples/part-00009.parquet", "b/plans/two.json", "c/manifest.json", "c/tables"]
    refused(root, [f"/runs/{path}" for path in asked])


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    assert ask(root.parent / "link", "/runs/a/manifest.json").status_code == 200
    assert ask(f"file://{root}", "/runs/a/manifest.json").status_code == 200
    # fsspec would follow links; a local path is a local path through any library.
    (root / "x").symlink_to(root.parent / "outside")
    assert ask(f"local://{root}", "/runs/a/manifest.json").status_code == 200
    assert ask(f"local://{root}", "/runs/x/manifest.json").status_code == 404


def test_special_files_and_names_are_named_and_not_served(root: Path) -> None:
    (root / "a" / "errors.parquet").unlink()
    os.mkfifo(root / "a" / "errors.parquet")
    (root / "a" / "plans" / "folder.json").mkdir()
    make_sweep(root / "new\nline")
    os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    found = listed(root)
    problems = " ".join(found["a"]["problems"])
    assert "errors.parquet is a special file" in problems and "folder.json is a folder" in problems
    assert "rename it" in found["new\nline"]["problems"][0] and "rename it" in found["??"]["problems"][0]
    refused(root, ["/runs/a/tables/errors.parquet", "/runs/a/plans/folder.json", "/runs/new%0aline/manifest.json"])
    assert ask(root, "/", headers=HTML).status_code == 200


def test_every_reply_is_guarded(root: Path) -> None:
    guards = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
    for path in ("/", "/runs.json", "/runs/a/", "/nothing", "/runs/a/tables/samples.parquet", "/runs/a"):
        for headers in ({}, HTML):
            response = ask(root, path, headers=headers)
            assert guards.items() <= dict(response.headers).items()
            if response.headers.get("content-type", "").startswith("text/html"):
                assert "default-src 'none'" in response.headers["content-security-policy"]


def test_the_log_holds_no_content(root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    caplog.set_level(logging.DEBUG)
    keys = (hashlib.sha256(b"a-key-of-24-characters-x").hexdigest(),)
    ask(root, f"/runs/a/nothing?{SECRET}", headers={"authorization": f"Bearer {SECRET}"})
    ask(root, "/runs/a/tables/samples.parquet")
    ask(root, "/", keys=keys, headers={"authorization": f"Bearer {SECRET}"})

    def fail(*_: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("reports.service.app.Search", fail)
    response = ask(root, "/runs.json")
    assert response.status_code == 500 and SECRET not in response.text
    lines = [record.getMessage() for record in caplog.records if record.name == "shortv.http"]
    statuses = [line.split()[3] for line in lines if " GET " in line]
    assert statuses == [f"status={status}" for status in (404, 200, 401, 500)]
    assert "kind=table" in lines[1] and any("RuntimeError" in line for line in lines)
    assert not any(SECRET in line for line in lines)
