"""A campaign on a runner without a model: what is run, what is written, what is printed."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reports.manifest import CampaignManifest, State
from reports.store import Folder
from shortv.errors import Refused
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.folder import TABLES
from shortv.workers.campaign.spec import CampaignSpec
from tests.workers.campaign.fakes import FakeRunner, make_sweep, recipe

TIMES = {"started", "finished", "wall_seconds"}


def campaign(wanted: CampaignSpec, runner: FakeRunner | None = None, status: int = 0) -> str:
    """Run the campaign and return what it printed."""
    console = Console(file=io.StringIO(), width=160)
    assert run_campaign(wanted, runner=runner or FakeRunner(), console=console) == status
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def tables(output: Path) -> Mapping[str, list[dict[str, Any]]]:
    """All tables without the times in them."""
    folder = Folder(output)
    found = {name: folder.read_table(name).to_pylist() for name in TABLES}
    found["answers"] = sorted(
        folder.read_tables("answers").to_pylist(), key=lambda row: (row["cell"], row["sample_id"])
    )
    return {
        name: [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for name, rows in found.items()
    }


def snapshot(output: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".driver.lock"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def last_table(said: str) -> str:
    return said[said.index("tiny on shapes") :]


def test_the_tables_of_a_campaign(tmp_path: Path) -> None:
    runner = FakeRunner()
    said = campaign(recipe(tmp_path, tasks=("shapes", "others"), fail_on_error=0.0), runner)
    assert "12 cells, 0 finished" in said and "[12/12] tiny last-3 others: exact_match 0." in said
    assert runner.opened == ["tiny: random0-3, random1-3, random2-3, first-3, last-3"]
    assert runner.ran[:2] == ["tiny full shapes", "tiny random0-3 shapes"]
    found = tables(tmp_path)
    assert [row["plan"] for row in found["cells"]][:3] == ["full", "random0-3", "random1-3"]
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("complete", 60, 0)}
    assert len(found["answers"]) == 12 * 60
    speed = {(row["plan"], row["task"]): row for row in found["speed"]}["last-3", "shapes"]
    assert (speed["t"], speed["v"], speed["prefill_ms_median"], speed["samples_per_second"]) == (10, 30, 5, 30)
    assert speed["decode_ms_per_token_median"] == 2 and 0 < speed["flops_ratio"] < 1
    compared = {row["plan"]: row for row in found["comparisons"] if row["metric"] == "exact_match"}
    assert set(compared) == {row["plan"] for row in found["cells"]} - {"full"}
    row = compared["first-3"]
    assert row["ci_low"] <= row["difference"] <= row["ci_high"] < 0 and row["n"] == 60
    assert row["difference"] == pytest.approx(row["value"] - row["against_value"])
    assert 0 < row["share_changed"] < 1
    metrics = {row["plan"]: row for row in found["metrics"]}
    assert metrics["first-3"]["value"] == row["value"] and metrics["first-3"]["stderr"] is None
    # Samples that a metric does not count are in no comparison by it.
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match_even"} == {30}


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    campaign(recipe(tmp_path, gen_kwargs={"api_key": "hunter2", "max_new_tokens": 4}))
    manifest = CampaignManifest.load(Folder(tmp_path))
    assert (manifest.state, manifest.counts["complete"], manifest.counts["samples"]) == (State.COMPLETE, 6, 360)
    assert manifest.tasks[0]["num_docs"] == 60 and manifest.models[0]["name"] == "tiny"
    assert [plan["kind"] for plan in manifest.plans] == ["full", "random", "random", "random", "first", "last"]
    assert manifest.plans[-1]["modes"] == ["full"] * 5 + ["freeze-visual"] * 3
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_finished_campaign_is_repeated_without_work(tmp_path: Path) -> None:
    first = campaign(recipe(tmp_path))
    before = snapshot(tmp_path)
    runner = FakeRunner()
    second = campaign(recipe(tmp_path), runner)
    assert runner.opened == [] and snapshot(tmp_path) == before
    assert "6 cells, 6 finished" in second and last_table(second) == last_table(first)
    (tmp_path / "speed.parquet").unlink()
    campaign(recipe(tmp_path), runner)
    assert runner.opened == [] and (tmp_path / "speed.parquet").exists()


def test_a_changed_recipe_adds_what_is_missing(tmp_path: Path) -> None:
    campaign(recipe(tmp_path))
    whole = tables(tmp_path)
    runner = FakeRunner()
    said = campaign(recipe(tmp_path, plans=("last@3", "last@2"), tasks=("shapes", "others")), runner)
    assert "6 cells, 2 finished" in said
    assert runner.ran == ["tiny last-2 shapes", "tiny full others", "tiny last-3 others", "tiny last-2 others"]
    assert len(tables(tmp_path)["cells"]) == 6
    runner = FakeRunner()
    campaign(recipe(tmp_path), runner)
    found = tables(tmp_path)
    assert runner.ran == [] and {name: found[name] for name in TABLES} == {name: whole[name] for name in TABLES}


@pytest.mark.parametrize(
    "change",
    [{"limit": 10.0}, {"seed": 1}, {"gen_kwargs": {"max_new_tokens": 4}}, {"dtype": "bfloat16"}, {"revision": "r"}],
)
def test_what_decides_results_makes_other_cells(tmp_path: Path, change: dict[str, Any]) -> None:
    campaign(recipe(tmp_path, plans=()))
    runner = FakeRunner()
    campaign(recipe(tmp_path, plans=(), **change), runner)
    assert runner.ran == ["tiny full shapes"]


def test_a_branch_that_moves_on_the_hub_makes_other_cells(tmp_path: Path) -> None:
    """Results belong to the commit that a revision named, and replicas load that commit."""
    runner = FakeRunner(commits={None: "c1"})
    assert run_campaign(recipe(tmp_path), runner=runner) == 0
    done = len(runner.ran)
    assert run_campaign(recipe(tmp_path), runner=runner) == 0 and len(runner.ran) == done
    runner.commits = {None: "c2"}
    assert run_campaign(recipe(tmp_path), runner=runner) == 0 and len(runner.ran) == 2 * done
    assert runner.revisions == ["c1", "c2"]
    assert {row["revision"] for row in Folder(tmp_path).read_table("cells").to_pylist()} == {"c2"}


def test_how_it_is_run_decides_nothing(tmp_path: Path) -> None:
    campaign(recipe(tmp_path))
    runner = FakeRunner()
    campaign(recipe(tmp_path, batch_size=2, num_concurrent=3, device="cpu", retry_failed=True), runner)
    assert runner.ran == []


def test_a_model_folder_is_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    runner = FakeRunner()
    campaign(recipe(tmp_path / "out", models=(str(tmp_path / "a"), str(tmp_path / "b")), plans=()), runner)
    assert len(runner.ran) == 1 and len(tables(tmp_path / "out")["cells"]) == 2
    (tmp_path / "b" / "config.json").write_text("{ }")
    campaign(recipe(tmp_path / "out", models=(str(tmp_path / "b"),), plans=()), runner)
    assert len(runner.ran) == 2


def test_the_printed_table_and_its_verdicts(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "demo")
    plans = (f"sweep:{sweep}@3", "random:0..4@3", "first@3", "last@3")
    runner = FakeRunner(samples=400)
    said = campaign(recipe(tmp_path / "out", plans=plans), runner)
    assert len(runner.ran) == 8 and not any("last-3" in ran for ran in runner.ran)
    assert "freeze-visual-3 loses less than random: +0." in said
    assert "against the mean of 5 random controls" in said
    assert "last-3 is a tie with freeze-visual-3" in said
    found = tables(tmp_path / "out")
    rows = {row["plan"]: row for row in found["cells"]}
    assert rows["last-3"]["same_as"] == "freeze-visual-3" and rows["last-3"]["cell"] == rows["freeze-visual-3"]["cell"]
    against = [row["against"] for row in found["comparisons"] if row["plan"] == "freeze-visual-3"]
    assert set(against) == {"full", "mean of 5 random controls"}
    controls = [row["value"] for row in found["metrics"] if row["plan"].startswith("random")]
    mean = next(
        row for row in found["comparisons"] if row["against"].startswith("mean") and row["metric"] == "exact_match"
    )
    assert mean["against_value"] == pytest.approx(sum(controls) / 5)
    lines = [line for line in said.splitlines() if line.strip("│ ").startswith("freeze-visual-3 ")]
    assert "0.62" in lines[0] and "200.0" in lines[0]  # prefill 5 ms of 8, 400 samples in 2 s


def test_small_samples_prove_nothing(tmp_path: Path) -> None:
    plans = (f"sweep:{make_sweep(tmp_path / 'demo')}@7", "random:1@7")
    said = campaign(recipe(tmp_path / "out", plans=plans), FakeRunner(samples=12))
    assert "freeze-visual-7 is no better than random" in said and "the mean of 1 random control" in said


def test_scores_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    campaign(recipe(tmp_path), FakeRunner(nan=True))
    found = tables(tmp_path)
    assert {row["n"] for row in found["comparisons"]} == {30}
    values = [score["value"] for row in found["answers"] for score in row["scores"]]
    assert None in values and all(value is None or value == value for value in values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("nothing",)}, "nothing is no model"),
        ({"tasks": ("nothing",)}, "knows no task"),
        ({"plans": ("none.json",)}, "cannot read plan"),
        ({"models": ("L9",), "plans": ("llava-1.5-7b",)}, "was made for"),
    ],
)
def test_what_cannot_be_right_is_refused_before_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    runner = FakeRunner()
    with pytest.raises(Refused, match=message):
        campaign(recipe(tmp_path / "out", **change), runner)
    assert runner.opened == [] and not (tmp_path / "out").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="of kind 'sweep', not 'campaign'"):
        campaign(recipe(make_sweep(tmp_path / "sweep")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match=r"holds 1 files \(thesis.txt\) and no campaign"):
        campaign(recipe(tmp_path / "other"))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="could not be listed"):
        campaign(recipe(tmp_path / "file"))


def test_remote_folders(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/campaign"
    first = campaign(recipe(Path("x"), output_path=uri))
    runner = FakeRunner()
    assert last_table(campaign(recipe(Path("x"), output_path=uri), runner)) == last_table(first)
    assert runner.ran == []


def test_records_are_readable(tmp_path: Path) -> None:
    campaign(recipe(tmp_path, plans=()))
    (file,) = (tmp_path / "cells").iterdir()
    record = json.loads(file.read_text())
    assert record["key"] == file.stem and record["identity"]["task"] == "shapes" and record["state"] == "complete"
    assert (tmp_path / "answers" / f"{file.stem}.parquet").exists()
