"""The list of runs: what there is, how far it got, and its main numbers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reports.page import PAGE_NAME
from reports.service import make_service
from reports.service.files import Files
from reports.service.runs import Search
from reports.service.summary import Summaries
from reports.service.tree import LocalTree
from reports.store import Folder
from shortv.errors import Refused
from tests.reports.runs import change_manifest, make_campaign, make_sweep, make_training
from tests.reports.service.asking import HTML, ask, listed

PAGE = b"<!doctype html><html><head></head><body><h1>page</h1></body></html>"


@pytest.fixture(name="root", scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, and what is not one."""
    root = tmp_path_factory.mktemp("root")
    make_sweep(root / "a b", details={"default_plan": "two"}).write_bytes(PAGE_NAME, PAGE)
    make_campaign(root / "team" / "x" / "c", failed=2)
    make_training(root / "dyvte")
    make_sweep(root / "1" / "2" / "3" / "4")
    make_sweep(root / ".hidden")
    (root / "note.txt").write_text("x")
    return root


def test_runs_are_listed_with_their_numbers(root: Path) -> None:
    runs = listed(root)
    assert set(runs) == {"a b", "team/x/c", "dyvte", "1"}
    sweep, campaign, training = runs["a b"], runs["team/x/c"], runs["dyvte"]
    assert (sweep["kind"], sweep["state"], sweep["problems"]) == ("sweep", "complete", [])
    assert sweep["modes"] == ["freeze-visual", "freeze-text"] and sweep["counts"]["used"] == 3
    assert sweep["headline"]["noise_floor"] == 1e-9
    assert sweep["headline"]["lowest_lc"]["mode"] == "freeze-visual"
    assert sweep["headline"]["lowest_lc"]["layers"][0] == {"layer": 4, "lc": 0.0}
    assert sweep["headline"]["default_plan"] == {"name": "two", "flops_ratio": None, "layers": [3, 4]}
    assert {item["path"]: item["problem"] for item in sweep["tables"]} == dict.fromkeys(
        f"tables/{name}.parquet" for name in ("errors", "lc_layers", "samples", "lc_samples/part-00000")
    )
    assert sweep["plan_files"] == ["plans/two.json"] and sweep["page"] == "runs/a%20b/"
    assert (campaign["kind"], campaign["state"], campaign["problems"]) == ("campaign", "partial", [])
    assert campaign["plans"] == ["full", "lc-2", "random0-2", "first-2"] and campaign["tasks"] == ["shapes"]
    assert (training["kind"], training["state"], training["problems"]) == ("training", "complete", [])
    assert (training["models"], training["parts"], training["page"]) == (["org/m"], ["dyvte"], None)
    assert training["headline"] == {"steps": 3, "loss": 0.0775, "train_seconds": 112.0, "learned_parameters": 132_096}
    for path in ("1/2/3/4/manifest.json", ".hidden/manifest.json"):
        assert ask(root, f"/runs/{path}").status_code == 404


def test_the_page_for_people_says_the_same_and_loads_nothing(root: Path) -> None:
    for path in ("/", "/runs"):
        response = ask(root, path, headers=HTML)
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "'sha256-" in policy and "unsafe" not in policy
        text = response.text
        assert 'href="runs/a%20b/"' in text and 'href="runs/a%20b/tables/samples.parquet"' in text
        assert "&lt;script&gt;" in text and "<script" not in text
        assert "noise floor" in text and "lc-2 0.88" in text and "FLOPs ratio 0.7" in text
        assert "0.0775 after 3 steps" in text and "132,096" in text and "no page" in text
        assert 'href="runs/dyvte/"' not in text


def test_json_is_there_for_who_asks(root: Path) -> None:
    for path, accept in (("/", "application/json"), ("/runs", "application/json"), ("/runs.json", "text/html")):
        response = ask(root, path, headers={"accept": accept})
        assert response.headers["content-type"] == "application/json" and len(response.json()["runs"]) == 4
    assert ask(root, "/", headers={"accept": "*/*"}).headers["content-type"].startswith("text/html")


def test_the_page_of_a_complete_run_is_as_it_was_made_and_a_training_has_none(root: Path) -> None:
    first, linked = ask(root, "/runs/a%20b/"), ask(root, "/runs/a%20b/report.html")
    assert first.content == linked.content == PAGE
    assert "sandbox allow-scripts" in first.headers["content-security-policy"]
    assert "allow-same-origin" not in first.headers["content-security-policy"]
    again = ask(root, "/runs/a%20b/", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    training = ask(root, "/runs/dyvte/")
    assert training.status_code == 404 and "is a training, which has no page" in training.json()["error"]["message"]
    assert ask(root, "/runs/dyvte/plans/dyvte-0.5.json").json()["name"] == "dyvte-0.5"
    for path in ("parts/parts.safetensors", "parts/parts.json", "tables/parts", "checkpoint/state.safetensors"):
        assert ask(root, f"/runs/dyvte/{path}").status_code == 404


@pytest.mark.parametrize("state", ["running", "partial"])
def test_an_unfinished_run_is_labelled_everywhere(tmp_path: Path, state: str) -> None:
    make_sweep(tmp_path / "a", state=state, finished=None)
    make_training(tmp_path / "t", state=state, finished=None)
    for run in listed(tmp_path).values():
        assert run["state"] == state and run["finished_run"] is (state != "running")
        assert bool(run["headline"]) is (state == "partial")
    label = f"This run is {'not finished' if state == 'running' else 'partial'}"
    list_page = ask(tmp_path, "/", headers=HTML).text
    assert list_page.count(label) == 2 and f'class="state {state}"' in list_page
    without = ask(tmp_path, "/runs/a/", headers=HTML)
    assert without.status_code == 404 and label in without.text and "jobs/report.py" in without.text
    Folder(tmp_path / "a").write_bytes(PAGE_NAME, PAGE)
    page = ask(tmp_path, "/runs/a/")
    assert page.status_code == 200 and f'<body><p class="warning" role="status">{label}' in page.text


def test_a_root_that_cannot_be_right_is_refused(root: Path) -> None:
    for place, why in (("dyvte", "a run itself"), ("note.txt", "is a file"), ("gone", "not there")):
        with pytest.raises(Refused, match=why):
            make_service(str(root / place))
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


LC = ("lc-2", "lc", 0.7, 0.88)
CONTROLS = (("random0-2", "random", 0.5, 0.97), ("first-2", "first", 0.5, 0.96))


# Plans by name, order of the layers, FLOPs ratio and metric; the best plan of LC, the best other one, the text.
@pytest.mark.parametrize(
    ("plans", "best", "other", "text"),
    [
        ([LC, *CONTROLS, ("adapters", "fixed", 1.013, 0.999), ("same", "lc", 1.0, 0.99)], "lc-2", None, "full 0.9"),
        (
            [LC, *CONTROLS, ("exit", "fixed", 0.6, 0.91), ("saisa", "fixed", 0.5, 0.95)],
            "lc-2",
            "saisa",
            "full 0.9; best other plan saisa 0.95",
        ),
        ([("a", "lc", 0.8, 0.9), ("b", "lc", 0.6, 0.9), ("c", "lc", 0.7, 0.9)], "b", None, "b 0.9"),
        ([("unknown", "lc", None, 0.9), ("failed", "lc", 0.5, None), *CONTROLS], None, None, "full 0.9<"),
    ],
    ids=["cheaper", "other", "tie", "none"],
)
def test_the_best_plans_are_cheaper_and_never_controls(
    tmp_path: Path, plans: Sequence[Any], best: str | None, other: str | None, text: str
) -> None:
    folder = make_campaign(tmp_path / "c")
    tables = {name: folder.read_table(name).to_pylist() for name in ("cells", "metrics")}
    cell, metric, answers = tables["cells"][0], tables["metrics"][0], folder.read_tables("answers").to_pylist()[:50]
    rows: dict[str, list[Any]] = {"cells": [cell], "metrics": [metric]}
    shape = {"model": "org/m", "kind": "plan", "digest": "d", "ranking": [], "modes": ["full", "freeze-visual"]}
    entries = [shape | {"name": "full", "kind": "full", "source": None}]
    for number, (name, order, flops, value) in enumerate(plans, 1):
        own = {"plan": name, "cell": f"{number:064}", "plan_digest": f"{number:064}"}
        rows["cells"].append(cell | own | {"flops_ratio": flops})
        rows["metrics"].append(metric | own | {"value": value})
        entries.append(shape | {"name": name, "source": {"order": order}})
        folder.write_table(f"answers/part-{number:06d}", [row | {"cell": own["cell"]} for row in answers])
    for table, content in rows.items():
        folder.write_table(table, content)
    change_manifest(tmp_path / "c", plans=entries, counts={"cells": len(plans) + 1})
    run = listed(tmp_path)["c"]
    (found,) = run["headline"]["best"]
    assert run["problems"] == [] and found["full"] == 0.9
    assert (found.get("plan"), found.get("other", {}).get("plan")) == (best, other)
    assert text in ask(tmp_path, "/", headers=HTML).text
