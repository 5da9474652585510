"""Runs that are damaged, foreign or hostile: named with the reason in the list, never served, one line from the job."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from jobs.report import main
from reports.page import PAGE_NAME
from reports.schemas import SCHEMAS
from reports.service.tree import LocalTree, Names, OpenFile
from reports.store import Folder
from shortv.errors import Refused
from tests.reports.runs import change_json, change_manifest, cut, keep_answers, make_campaign, make_sweep, make_training
from tests.reports.service.asking import HTML, ask, ask_all, listed

HUGE = 10**400
DEEP: Any = "x"
for _ in range(800):
    DEEP = [DEEP]

Spoil = Callable[[Path], object]


def manifest(**changes: Any) -> Spoil:
    return lambda folder: change_manifest(folder, **changes)


def plan(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "plans" / "two.json", **changes)


def written(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Spoil:
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def many_rows(folder: Path) -> None:
    table = pq.read_table(folder / "lc_layers.parquet").slice(0, 1)
    pq.write_table(pa.concat_tables([table] * 200_000).combine_chunks(), folder / "lc_layers.parquet")


def bomb(folder: Path) -> None:
    """Write 40 rows of 8 MB that compress to a few kilobytes."""
    row = pq.read_table(folder / "samples.parquet").to_pylist()[0] | {"prompt": "x" * 2**23}
    table = pa.Table.from_pylist([row] * 40, schema=SCHEMAS["samples"])
    pq.write_table(table, folder / "samples.parquet", compression="zstd")
    assert (folder / "samples.parquet").stat().st_size < 2**20


def flip_bytes(path: Path) -> None:
    """Damage the data of a Parquet file, and leave its footer whole."""
    data = bytearray(path.read_bytes())
    data[4:64] = bytes(255 - byte for byte in data[4:64])
    path.write_bytes(bytes(data))


def fewer_answers(folder: Path) -> None:
    keep_answers(Folder(folder), lambda row: row["cell"] != "1" * 64 or row["doc"] > 7)


# What is done to a run, and what the list says of it; "" where it has nothing to say.
UNREADABLE: dict[str, tuple[Spoil, str]] = {
    "cut": (lambda folder: cut(folder / "manifest.json"), "not valid JSON"),
    "nested": (written("manifest.json", b"[" * 100_000), "not valid JSON"),
    "list": (written("manifest.json", b"[]"), "JSON list"),
    "large": (lambda folder: os.truncate(folder / "manifest.json", 20 * 2**30), "bytes"),
    "newer": (manifest(schema_version=2), "schema version 2, this release reads 1"),
    "kind": (manifest(kind="poem"), "of kind 'poem'"),
    "layers": (manifest(num_layers=999_999_999_999), "has num_layers 999999999999"),
    "digits": (manifest(noise_floor=HUGE), "holds the number"),
    "deep": (manifest(details={"x": DEEP}), "nested"),
    "stability": (manifest(stability={"freeze-visual": {"half": 0.5}}), "has stability"),
    "none": (removed("manifest.json"), "it has no manifest.json"),
}
SWEEPS: dict[str, tuple[Spoil, str]] = {
    "cut-table": (lambda folder: cut(folder / "lc_layers.parquet"), "lc_layers.parquet is not a whole Parquet file"),
    "cut-part": (lambda folder: cut(folder / "lc_samples/part-00000.parquet"), "part-00000.parquet is not a whole"),
    "flipped": (lambda folder: flip_bytes(folder / "lc_layers.parquet"), "lc_layers.parquet is not a whole"),
    "large-table": (lambda folder: os.truncate(folder / "samples.parquet", 20 * 2**30), "is not a whole Parquet file"),
    "other-table": (
        lambda folder: shutil.copy(folder / "errors.parquet", folder / "lc_layers.parquet"),
        "table errors",
    ),
    "many-rows": (many_rows, "has 200000 rows"),
    "bomb": (bomb, "samples.parquet has 40 rows, and 3 by the counts of the manifest"),
    "no-layers": (removed("lc_layers.parquet"), "lc_layers.parquet is missing although the run has ended"),
    "no-parts": (removed("lc_samples/*"), "lc_samples/*.parquet is missing although the run has ended"),
    "nothing": (
        removed("**/*.parquet"),
        "samples.parquet, lc_layers.parquet, errors.parquet, lc_samples",
    ),
    "fewer-parts": (removed("lc_samples/part-00001.parquet"), "has 20 rows, and 30 by the counts of the manifest"),
    "more-used": (manifest(counts={"used": 4, "errors": 0}), "has 3 rows, and 4 by the counts of the manifest"),
    "deeper": (manifest(num_layers=6), "each layer once"),
    "cut-plan": (written("plans/two.json", b"{"), "plans/two.json is not usable: the plan is not valid JSON"),
    "plan-digits": (plan(flops_ratio=HUGE), "plans/two.json is not usable: "),
    "plan-large": (lambda folder: os.truncate(folder / "plans/two.json", 20 * 2**30), "bytes"),
}
PLAN = {"name": "full", "model": "m", "modes": [], "kind": "x", "digest": ""}
CAMPAIGNS: dict[str, tuple[Spoil, str]] = {
    "no-answers": (
        lambda folder: shutil.rmtree(folder / "answers"),
        "answers/*.parquet is missing although the run has ended",
    ),
    "no-part": (removed("answers/part-000001.parquet"), "answers/*.parquet has 128 rows, and the cells have 200"),
    "fewer-answers": (fewer_answers, "answers/*.parquet has 192 rows, and the cells have 200 samples"),
    "models": (manifest(models=[{}]), "has models"),
    "plan-modes": (manifest(plans=[PLAN | {"modes": [{}]}]), "has plans"),
    "plan-parts": (manifest(plans=[PLAN | {"parts": {"kind": []}}]), ""),
    "metric": (manifest(tasks=[{"name": "shapes", "main_metric": [["x"]]}]), ""),
    "limit": (manifest(arguments={"limit": "many"}), ""),
}
TRAININGS: dict[str, tuple[Spoil, str]] = {
    "parts": (written("parts/parts.json", b"{"), "parts/parts.json is not valid JSON"),
    "errors": (manifest(counts={"steps": 3, "errors": 2}), "errors.parquet is missing although the run has ended"),
    "steps": (manifest(counts={"steps": 5}), "training.parquet has 3 rows, and 5 by the counts of the manifest"),
    "loss": (manifest(details={"loss": "low"}), "no job writes"),
}


class Damaged(NamedTuple):
    """A root with a folder for each case, and its list."""

    root: Path
    runs: dict[str, Any]
    page: str


@pytest.fixture(scope="module", name="damaged")
def _damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damaged]:
    root = tmp_path_factory.mktemp("damaged")
    for kind, cases in (("unreadable", UNREADABLE), ("sweep", SWEEPS)):
        for case, (spoil, _) in cases.items():
            make_sweep(root / kind / case, rows_per_part=10, details={"default_plan": "two"})
            spoil(root / kind / case)
    for case, (spoil, _) in CAMPAIGNS.items():
        make_campaign(root / "campaign" / case, failed=3)
        spoil(root / "campaign" / case)
    for case, (spoil, _) in TRAININGS.items():
        make_training(root / "training" / case)
        spoil(root / "training" / case)
    make_sweep(root / "sweep" / "good")
    make_campaign(root / "campaign" / "good")
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Fail instead of taking the machine down: 20 GB were used where a set was built from a manifest's number.
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, before[1]))
    yield Damaged(root, listed(root), ask(root, "/", headers=HTML).text.replace("&#39;", "'"))
    resource.setrlimit(resource.RLIMIT_AS, before)


def cases_of(kind: str, cases: dict[str, tuple[Spoil, str]]) -> list[tuple[str, str, str]]:
    return [(kind, case, said) for case, (_, said) in cases.items()]


@pytest.mark.parametrize(("kind", "case", "said"), cases_of("unreadable", UNREADABLE))
def test_what_is_not_a_readable_run_is_named_and_nothing_of_it_is_served(
    damaged: Damaged, kind: str, case: str, said: str
) -> None:
    run = damaged.runs[f"{kind}/{case}"]
    assert run["state"] == "unreadable" and "headline" not in run
    (problem,) = run["problems"]
    assert said in problem and str(damaged.root) not in problem and said in damaged.page
    for path in ("", "manifest.json", "tables", "tables/samples.parquet", "plans/two.json"):
        response = ask(damaged.root, f"/runs/{kind}/{case}/{path}")
        assert response.status_code == (404 if case == "none" else 422)
        assert case == "none" or said in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "case", "said"),
    [*cases_of("sweep", SWEEPS), *cases_of("campaign", CAMPAIGNS), *cases_of("training", TRAININGS)],
)
def test_damage_is_named_and_gives_no_wrong_number(damaged: Damaged, kind: str, case: str, said: str) -> None:
    run = damaged.runs[f"{kind}/{case}"]
    assert all("\n" not in problem and len(problem) < 1000 for problem in run["problems"])
    assert str(damaged.root) not in str(run)
    assert any(said in problem for problem in run["problems"]) if said else run["problems"] == []
    assert said in damaged.page
    if "lc_layers" in said or "each layer" in said or case == "other-table":
        assert "lowest_lc" not in run["headline"]
    assert damaged.runs["sweep/good"]["problems"] == damaged.runs["campaign/good"]["problems"] == []


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("sweep", case) for case in SWEEPS), *(("campaign", case) for case in CAMPAIGNS)]
    + [("unreadable", case) for case in UNREADABLE],
)
def test_the_job_draws_a_page_or_refuses_in_one_line(damaged: Damaged, tmp_path: Path, kind: str, case: str) -> None:
    try:
        status = main.main(
            [str(damaged.root / kind / case), "--output", f"{tmp_path}/page.html"], standalone_mode=False
        )
        assert status == 0 and kind != "unreadable"
    except Refused as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert not (tmp_path / "page.html").exists()


def test_cells_without_answers_of_their_own_lack_none(tmp_path: Path) -> None:
    folder = make_campaign(tmp_path / "c")
    full, twin, failed, last = folder.read_table("cells").to_pylist()
    twin |= {"same_as": "full", "cell": full["cell"]}
    failed |= {"state": "failed", "errors": failed["n"], "message": "no GPU"}
    folder.write_table("cells", [full, twin, failed, last])
    keep_answers(folder, lambda row: row["cell"] in (full["cell"], last["cell"]))
    problems = listed(tmp_path)["c"]["problems"]
    assert not any("answers" in problem for problem in problems), problems


def test_what_failed_when_it_was_read_is_not_served(tmp_path: Path) -> None:
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


def test_the_page_of_a_run_shows_its_problems(tmp_path: Path) -> None:
    page = b"<!doctype html><html><body><h1>page</h1></body></html>"
    make_sweep(tmp_path / "<a>").write_bytes(PAGE_NAME, page)
    assert ask(tmp_path, "/runs/%3Ca%3E/").content == page
    (tmp_path / "<a>" / "errors.parquet").write_bytes(b"PAR1")
    text = ask(tmp_path, "/runs/%3Ca%3E/").text
    note = '<body><p class="warning" role="status">&lt;a&gt;/errors.parquet is not a whole Parquet file'
    assert note in text and text.endswith("<h1>page</h1></body></html>")


def test_a_plan_that_is_not_served_has_no_link(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    plans = tmp_path / "a" / "plans"
    (plans / "cut.json").write_text("{")
    (plans / "link.json").symlink_to(plans / "two.json")
    run = listed(tmp_path)["a"]
    assert run["plan_files"] == ["plans/two.json"] and len(run["problems"]) == 2
    text = ask(tmp_path, "/", headers=HTML).text
    assert 'plans/two.json" download' in text and 'cut.json"' not in text and 'link.json"' not in text
    assert "plan cut (a/plans/cut.json is not usable: the plan is not valid JSON" in text
    assert "plan link (a/plans/link.json is a symbolic link, which is not followed)" in text
