"""What is missing or damaged in a run is named in the list and on its page, and not handed out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.page import PAGE_NAME
from reports.service.tree import LocalTree, Names, OpenFile
from reports.store import Folder
from tests.reports.runs import make_sweep
from tests.reports.service.asking import HTML, ask, ask_all, listed
from tests.reports.service.folders import flip_bytes, make_campaign

PAGE = b"<!doctype html><html><body><h1>page</h1></body></html>"


def _without_parts(folder: Path) -> None:
    shutil.rmtree(folder / "lc_samples")


def _without_a_part(folder: Path) -> None:
    (folder / "lc_samples" / "part-00001.parquet").unlink()


def _fewer_answers(folder: Path) -> None:
    names = f"answers/{'1' * 64}"
    Folder(folder).write_table(names, Folder(folder).read_table(names).slice(8))


SWEEPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-part": (_without_parts, "lc_samples/*.parquet is missing although the run has ended"),
    "nothing": (
        lambda folder: [path.unlink() for path in folder.rglob("*.parquet")],
        "samples.parquet, lc_layers.parquet, errors.parquet, lc_samples/*.parquet are missing although the run has "
        "ended",
    ),
    "fewer-parts": (
        _without_a_part,
        "a/lc_samples/*.parquet has 20 rows, and 30 by the counts of the manifest",
    ),
}
CAMPAIGNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-answers": (
        lambda folder: shutil.rmtree(folder / "answers"),
        "the answers of 4 cells are missing although the run has ended: org/m full shapes, org/m lc-2 shapes, "
        "org/m random0-2 shapes and 1 more",
    ),
    "a-cell": (
        lambda folder: (folder / "answers" / f"{'2' * 64}.parquet").unlink(),
        "the answers of 1 cell are missing although the run has ended: org/m random0-2 shapes",
    ),
    "fewer": (_fewer_answers, "the answers of 1 cell are not as many as its samples: org/m lc-2 shapes has 42 of 50"),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_measurements_that_are_missing_are_named(tmp_path: Path, case: str) -> None:
    make_sweep(tmp_path / "a", rows_per_part=10)
    spoil, problem = SWEEPS[case]
    spoil(tmp_path / "a")
    assert listed(tmp_path)["a"]["problems"] == [problem]


@pytest.mark.parametrize("case", CAMPAIGNS)
def test_answers_that_are_missing_are_named(tmp_path: Path, case: str) -> None:
    make_campaign(tmp_path / "c", failed=3)
    assert listed(tmp_path)["c"]["problems"] == []
    spoil, problem = CAMPAIGNS[case]
    spoil(tmp_path / "c")
    assert listed(tmp_path)["c"]["problems"] == [problem]


def test_cells_without_answers_of_their_own_lack_none(tmp_path: Path) -> None:
    folder = make_campaign(tmp_path / "c")
    full, twin, failed, last = folder.read_table("cells").to_pylist()
    twin |= {"same_as": "full", "cell": full["cell"]}
    failed |= {"state": "failed", "errors": failed["n"], "message": "no GPU"}
    folder.write_table("cells", [full, twin, failed, last])
    for number in (1, 2):
        folder.delete(f"answers/{str(number) * 64}.parquet")
    problems = listed(tmp_path)["c"]["problems"]
    assert not any("answers" in problem for problem in problems), problems


def test_what_failed_when_it_was_read_is_not_handed_out(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    flip_bytes(tmp_path / "a" / "lc_layers.parquet")
    table, runs = "/runs/a/tables/lc_layers.parquet", "/runs.json"
    listing, response, again = ask_all(tmp_path, [("GET", runs, {}), ("GET", table, {}), ("GET", runs, {})])
    (run,) = listing.json()["runs"]
    (item,) = [item for item in run["tables"] if item["table"] == "lc_layers"]
    assert "a/lc_layers.parquet is not a whole Parquet file" in item["problem"] and item["rows"] is None
    assert run["problems"] == [item["problem"]] and again.json() == listing.json()
    assert response.status_code == 422 and response.json()["error"]["message"] == item["problem"]
    # The file is there again.
    make_sweep(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "lc_layers.parquet", tmp_path / "a" / "lc_layers.parquet")
    assert [answer.status_code for answer in ask_all(tmp_path, [("GET", runs, {}), ("GET", table, {})])] == [200, 200]


def test_a_read_that_was_interrupted_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sweep(tmp_path / "a")
    open_file, broken = LocalTree.open, True

    def interrupted(self: LocalTree, names: Names) -> OpenFile:
        nonlocal broken
        if broken and names == ("a", "samples.parquet"):
            broken = False
            raise OSError(5, "Input/output error")
        return open_file(self, names)

    monkeypatch.setattr(LocalTree, "open", interrupted)
    first, second = ask_all(tmp_path, [("GET", "/runs.json", {})] * 2)
    assert "samples.parquet could not be read: Input/output error" in first.json()["runs"][0]["problems"][0]
    assert second.json()["runs"][0]["problems"] == []


def test_the_page_shows_the_problems_of_its_run(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "<a>")
    folder.write_bytes(PAGE_NAME, PAGE)
    assert ask(tmp_path, "/runs/%3Ca%3E/").content == PAGE
    (tmp_path / "<a>" / "errors.parquet").write_bytes(b"PAR1")
    text = ask(tmp_path, "/runs/%3Ca%3E/").text
    note = '<body><p class="warning" role="status">&lt;a&gt;/errors.parquet is not a whole Parquet file'
    assert note in text and text.endswith("<h1>page</h1></body></html>")


def test_a_plan_that_is_not_handed_out_has_no_link(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    plans = tmp_path / "a" / "plans"
    (plans / "cut.json").write_text("{")
    (plans / "link.json").symlink_to(plans / "two.json")
    run = listed(tmp_path)["a"]
    assert run["plan_files"] == ["plans/two.json"] and len(run["problems"]) == 2
    text = ask(tmp_path, "/", headers=HTML).text
    assert 'plans/two.json" download' in text and 'cut.json"' not in text and 'link.json"' not in text
    assert "plan cut (a/plans/cut.json: the plan is not valid JSON" in text
    assert "plan link (a/plans/link.json is a symbolic link, which is not followed)" in text
