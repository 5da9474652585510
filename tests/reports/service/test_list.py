"""The list of runs: what there is, how far it got, and what is wrong with it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reports.manifest import State
from reports.page import PAGE_NAME
from reports.service import make_service
from reports.service.files import Files
from reports.service.runs import Search
from reports.service.summary import Summaries
from reports.service.tree import LocalTree
from reports.store import Folder
from shortv.errors import Refused
from tests.reports.runs import make_sweep
from tests.reports.service.asking import HTML, ask, ask_all, listed
from tests.reports.service.folders import make_campaign

PAGE = b"<!doctype html><html><head></head><body><h1>page</h1></body></html>"


def test_a_sweep_is_listed_with_its_numbers(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a", details={"default_plan": "two"})
    run = listed(tmp_path)["a"]
    assert (run["kind"], run["state"], run["problems"]) == ("sweep", "complete", [])
    assert run["modes"] == ["freeze-visual", "freeze-text"] and run["counts"]["used"] == 3
    assert run["headline"]["noise_floor"] == 1e-9
    assert run["headline"]["lowest_lc"]["mode"] == "freeze-visual"
    assert run["headline"]["lowest_lc"]["layers"][0] == {"layer": 4, "lc": 0.0}
    assert run["headline"]["default_plan"] == {"name": "two", "flops_ratio": None, "layers": [3, 4]}
    assert [(item["path"], item["problem"]) for item in run["tables"]] == [
        ("tables/errors.parquet", None),
        ("tables/lc_layers.parquet", None),
        ("tables/samples.parquet", None),
        ("tables/lc_samples/part-00000.parquet", None),
    ]
    assert run["plan_files"] == ["plans/two.json"] and run["page"] is None


def test_a_campaign_is_listed_with_its_best_plan(tmp_path: Path) -> None:
    make_campaign(tmp_path / "team" / "x" / "c", failed=2)
    run = listed(tmp_path)["team/x/c"]
    assert (run["kind"], run["state"], run["problems"]) == ("campaign", "partial", [])
    assert run["plans"] == ["full", "lc-2", "random0-2", "first-2"] and run["tasks"] == ["shapes"]
    (best,) = run["headline"]["best"]
    assert (best["plan"], best["value"], best["flops_ratio"], best["full"]) == ("lc-2", 0.88, 0.7, 0.9)


def test_the_page_for_people_says_the_same_and_loads_nothing(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a b", details={"default_plan": "two"})
    make_campaign(tmp_path / "c")
    Folder(tmp_path / "c").write_bytes(PAGE_NAME, PAGE)
    for path in ("/", "/runs"):
        response = ask(tmp_path, path, headers=HTML)
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "'sha256-" in policy and "unsafe" not in policy
        text = response.text
        assert 'href="runs/a%20b/"' in text and 'href="runs/a%20b/tables/samples.parquet"' in text
        assert "&lt;script&gt;" in text and "<script" not in text
        assert "noise floor" in text and "lc-2 0.88" in text and "FLOPs ratio 0.7" in text


def test_json_is_there_for_who_asks(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    for path, accept in (("/", "application/json"), ("/runs", "application/json"), ("/runs.json", "text/html")):
        response = ask(tmp_path, path, headers={"accept": accept})
        assert response.headers["content-type"] == "application/json"
        assert [run["id"] for run in response.json()["runs"]] == ["a"]
    assert ask(tmp_path, "/", headers={"accept": "*/*"}).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("state", ["running", "partial"])
def test_an_unfinished_run_is_labelled_everywhere(tmp_path: Path, state: str) -> None:
    make_sweep(tmp_path / "a", state=state, finished=None)
    run = listed(tmp_path)["a"]
    assert run["state"] == state and run["finished_run"] is (state != "running")
    assert bool(run["headline"]) is (state == "partial")
    label = f"This run is {'not finished' if state == 'running' else 'partial'}"
    list_page = ask(tmp_path, "/", headers=HTML).text
    assert label in list_page and f'class="state {state}"' in list_page
    without = ask(tmp_path, "/runs/a/", headers=HTML)
    assert without.status_code == 404 and label in without.text and "jobs/report.py" in without.text
    Folder(tmp_path / "a").write_bytes(PAGE_NAME, PAGE)
    page = ask(tmp_path, "/runs/a/")
    assert page.status_code == 200 and f'<body><p class="warning" role="status">{label}' in page.text


def test_the_page_of_a_complete_run_is_as_it_was_made(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    Folder(tmp_path / "a").write_bytes(PAGE_NAME, PAGE)
    first, linked = ask(tmp_path, "/runs/a/"), ask(tmp_path, "/runs/a/report.html")
    assert first.content == linked.content == PAGE
    assert "sandbox allow-scripts" in first.headers["content-security-policy"]
    assert "allow-same-origin" not in first.headers["content-security-policy"]
    again = ask(tmp_path, "/runs/a/", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _manifest(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(value | changes))


BROKEN = {
    "cut-manifest": (lambda folder: _cut(folder / "manifest.json"), "not valid JSON"),
    "newer": (lambda folder: _manifest(folder, schema_version=2), "schema version 2, this release reads 1"),
    "kind": (lambda folder: _manifest(folder, kind="poem"), "of kind 'poem'"),
    "list": (lambda folder: (folder / "manifest.json").write_text("[]"), "JSON list"),
    "deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
    "binary": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "empty": (lambda folder: (folder / "manifest.json").write_bytes(b""), "not valid JSON"),
    "type": (lambda folder: _manifest(folder, counts=[]), "has counts []"),
    "state": (lambda folder: _manifest(folder, state="done"), "has state 'done'"),
    "no-manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_readable_run_is_named_with_the_reason(tmp_path: Path, case: str) -> None:
    make_sweep(tmp_path / "good")
    make_sweep(tmp_path / case)
    spoil, reason = BROKEN[case]
    spoil(tmp_path / case)
    runs = listed(tmp_path)
    assert runs["good"]["problems"] == []
    assert runs[case]["state"] == "unreadable" and "headline" not in runs[case]
    (problem,) = runs[case]["problems"]
    assert reason in problem and str(tmp_path) not in problem
    page = ask(tmp_path, "/", headers=HTML)
    assert page.status_code == 200 and case in page.text and "Traceback" not in page.text
    for path in ("", "manifest.json", "tables", "tables/samples.parquet", "plans/two.json"):
        response = ask(tmp_path, f"/runs/{case}/{path}")
        assert response.status_code == (404 if case == "no-manifest" else 422)
        assert "\n" not in response.text.rstrip("\n")
        if case != "no-manifest":
            assert reason in response.json()["error"]["message"]


DAMAGED = {
    "cut-table": (lambda folder: _cut(folder / "lc_layers.parquet"), "lc_layers.parquet is not a whole Parquet file"),
    "cut-part": (lambda folder: _cut(folder / "lc_samples/part-00000.parquet"), "part-00000.parquet is not a whole"),
    "empty-table": (lambda folder: (folder / "lc_layers.parquet").write_bytes(b""), "lc_layers.parquet is not a whole"),
    "missing": (lambda folder: (folder / "lc_layers.parquet").unlink(), "lc_layers.parquet is missing"),
    "other": (
        lambda folder: (folder / "lc_layers.parquet").write_bytes((folder / "errors.parquet").read_bytes()),
        "lc_layers.parquet holds the table errors",
    ),
    "counts": (lambda folder: _manifest(folder, counts={"used": 4, "errors": 0}), "3 rows, and 4 by the counts"),
    "layers": (lambda folder: _manifest(folder, num_layers=6), "each layer once"),
    "plan": (lambda folder: (folder / "plans/two.json").write_text("{"), "plans/two.json: the plan is not valid JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_and_gives_no_wrong_number(tmp_path: Path, case: str) -> None:
    make_sweep(tmp_path / case, details={"default_plan": "two"})
    spoil, reason = DAMAGED[case]
    spoil(tmp_path / case)
    run = listed(tmp_path)[case]
    assert any(reason in problem for problem in run["problems"]), run["problems"]
    assert str(tmp_path) not in str(run)
    if case in ("cut-table", "empty-table", "missing", "other", "layers"):
        assert "lowest_lc" not in run["headline"]
    assert reason in ask(tmp_path, "/", headers=HTML).text.replace("&#39;", "'")


def test_a_change_is_seen_at_once(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a", state="running")
    app_root = tmp_path
    assert listed(app_root)["a"]["state"] == State.RUNNING
    make_sweep(tmp_path / "a", layers=3)
    make_sweep(tmp_path / "b")
    first, second = ask_all(tmp_path, [("GET", "/runs.json", {})] * 2)
    assert first.json() == second.json()
    assert [run["state"] for run in second.json()["runs"]] == ["complete", "complete"]


def test_what_is_too_deep_or_hidden_is_not_listed(tmp_path: Path) -> None:
    make_sweep(tmp_path / "1" / "2" / "3" / "4")
    make_sweep(tmp_path / ".hidden")
    make_sweep(tmp_path / "a")
    (tmp_path / "note.txt").write_text("x")
    assert set(listed(tmp_path)) == {"1", "a"}
    assert ask(tmp_path, "/runs/1/2/3/4/manifest.json").status_code == 404
    assert ask(tmp_path, "/runs/.hidden/manifest.json").status_code == 404


def test_a_root_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    for root, why in (("a", "a run itself"), ("a/manifest.json", "is a file"), ("gone", "not there")):
        with pytest.raises(Refused, match=why):
            make_service(str(tmp_path / root))
    with pytest.raises(Refused, match="cannot be opened"):
        make_service("nowhere://x/y")


def test_a_run_is_read_again_only_when_a_file_of_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sweep(tmp_path / "a")
    make_campaign(tmp_path / "c")
    opened: set[str] = set()
    open_file = LocalTree.open
    monkeypatch.setattr(LocalTree, "open", lambda self, names: opened.add(names[0]) or open_file(self, names))
    summaries = Summaries(Files(LocalTree(str(tmp_path))))

    def read() -> tuple[set[str], int]:
        opened.clear()
        for path in tmp_path.rglob("*.*"):
            # A file that was written a moment ago may be written again with the same time.
            os.utime(path, (1e9, 1e9))
        found = [summaries.of(found) for found in Search(LocalTree(str(tmp_path))).found]
        return set(opened), sum(len(summary.problems) for summary in found)

    assert [read(), read()] == [({"a", "c"}, 0), (set(), 0)]
    (tmp_path / "a" / "plans" / "two.json").write_text("{")
    assert [read(), read()] == [({"a"}, 1), (set(), 1)]
