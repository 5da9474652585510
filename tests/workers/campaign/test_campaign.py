"""A campaign on workers without a model: which documents are asked, what is written and what is printed."""

from pathlib import Path
from typing import Any

import pytest

from reports.manifest import CampaignManifest, State
from reports.store import Folder
from shortv.errors import Refused
from shortv.workers.campaign.folder import TABLES
from tests.workers.campaign.fakes import FakeWorkers, campaign, campaign_spec, last_table, make_sweep, tables

PLANS = ("random0-3", "random1-3", "random2-3", "first-3", "last-3")


def snapshot(output: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".driver.lock"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_the_tables_of_a_campaign(tmp_path: Path) -> None:
    workers = FakeWorkers()
    output = campaign(campaign_spec(tmp_path, tasks=("shapes", "others"), fail_on_error=0.0), workers)
    assert "12 cells, 0 finished" in output and "/12] tiny last-3 others: exact_match 0." in output
    assert workers.started == ["tiny: random0-3, random1-3, random2-3, first-3, last-3"]
    assert workers.units == [(60, 6)] * 2 and workers.measured == [("full", *PLANS)] * 2
    found = tables(tmp_path)
    assert [row["plan"] for row in found["cells"]][:3] == ["full", "random0-3", "random1-3"]
    assert {(row["state"], row["n"], row["errors"]) for row in found["cells"]} == {("complete", 60, 0)}
    assert [row["busy_seconds"] for row in found["cells"]] == pytest.approx([60 * 0.04] * 12)
    assert len(found["answers"]) == 12 * 60
    speed = {(row["plan"], row["task"]): row for row in found["speed"]}["last-3", "shapes"]
    assert (speed["t"], speed["v"], speed["prefill_ms_median"], speed["samples_per_second"]) == (10, 30, 5, 25)
    assert (speed["vision_ms_median"], speed["preprocess_ms_median"], speed["prefill_batch_median"]) == (3, 2, 16)
    assert speed["decode_ms_per_token_median"] == 2 and 0 < speed["flops_ratio"] < 1
    assert (speed["prefill_ratio"], speed["ttft_ms"], speed["batch"]) == (5 / 8, 10, 16)
    assert speed["peak_bytes"] is None
    assert {
        tuple(row.values())
        for row in Folder(tmp_path).read_table("speed").select(["idle_share", "replicas"]).to_pylist()
    } == {(0.25, 1)}
    compared = {row["plan"]: row for row in found["comparisons"] if row["metric"] == "exact_match"}
    assert set(compared) == {row["plan"] for row in found["cells"]} - {"full"}
    row = compared["first-3"]
    assert row["ci_low"] <= row["difference"] <= row["ci_high"] < 0 and row["n"] == 60
    assert row["difference"] == pytest.approx(row["value"] - row["against_value"])
    assert 0 < row["share_changed"] < 1
    metrics = {row["plan"]: row for row in found["metrics"]}
    assert metrics["first-3"]["value"] == row["value"] and metrics["first-3"]["stderr"] is None
    # Samples without a score of a metric are not compared by it.
    assert {row["n"] for row in found["comparisons"] if row["metric"] == "exact_match_even"} == {30}


def test_the_manifest(tmp_path: Path) -> None:
    campaign(campaign_spec(tmp_path, gen_kwargs={"api_key": "hunter2", "max_new_tokens": 4}))
    manifest = CampaignManifest.load(Folder(tmp_path))
    assert (manifest.state, manifest.counts["complete"], manifest.counts["samples"]) == (State.COMPLETE, 6, 360)
    assert manifest.attempts == 1 and manifest.finished and manifest.wall_seconds is not None
    assert manifest.tasks[0]["num_docs"] == 60 and manifest.models[0]["name"] == "tiny"
    assert [plan["kind"] for plan in manifest.plans] == ["full", "random", "random", "random", "first", "last"]
    assert manifest.plans[-1]["modes"] == ["full"] * 5 + ["freeze-visual"] * 3
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_finished_campaign_is_repeated_without_work(tmp_path: Path) -> None:
    first = campaign(campaign_spec(tmp_path), page=True)
    before, workers = snapshot(tmp_path), FakeWorkers()
    second = campaign(campaign_spec(tmp_path), workers, page=True)
    assert workers.started == [] and snapshot(tmp_path) == before
    assert "6 cells, 6 finished" in second and last_table(second) == last_table(first)
    for name in ("speed.parquet", "report.html"):
        (tmp_path / name).unlink()
        campaign(campaign_spec(tmp_path), workers, page=True)
        assert workers.started == [] and (tmp_path / name).exists()
    # Settings that do not decide results change no cell.
    campaign(campaign_spec(tmp_path, batch_size=2, num_concurrent=3, device="cpu", retry_failed=True), workers)
    assert workers.asked == []


def test_a_changed_spec_asks_what_is_missing(tmp_path: Path) -> None:
    campaign(campaign_spec(tmp_path))
    whole, workers = tables(tmp_path), FakeWorkers()
    output = campaign(campaign_spec(tmp_path, plans=("last@3", "last@2"), tasks=("shapes", "others")), workers)
    assert "6 cells, 2 finished" in output
    assert workers.ran == ["tiny last-2 shapes", "tiny full others", "tiny last-3 others", "tiny last-2 others"]
    assert len(workers.asked) == 4 * 60 and len(tables(tmp_path)["cells"]) == 6
    # The plan that is new is measured beside the others.
    assert workers.measured == [("full", "last-3", "last-2")] * 2
    workers = FakeWorkers()
    campaign(campaign_spec(tmp_path), workers)
    found = tables(tmp_path)
    assert workers.ran == [] and {name: found[name] for name in TABLES} == {name: whole[name] for name in TABLES}


def test_a_larger_limit_asks_the_new_documents(tmp_path: Path) -> None:
    spec = campaign_spec(tmp_path, plans=("last@3",), limit=10.0)
    campaign(spec)
    workers = FakeWorkers(samples=200)
    output = campaign(spec.model_copy(update={"limit": 150.0}), workers)
    assert "2 cells, 0 finished" in output
    assert sorted(workers.asked) == sorted(
        ("tiny", plan, "shapes", doc) for plan in ("full", "last-3") for doc in range(10, 150)
    )
    assert workers.units == [(54, 2), (64, 2), (22, 2)] and {row["n"] for row in tables(tmp_path)["cells"]} == {150}
    # With fewer documents, the answers to the others are left out.
    campaign(spec, workers)
    assert {row["n"] for row in tables(tmp_path)["cells"]} == {10} and len(workers.asked) == 280


def test_an_edited_document_is_asked_again(tmp_path: Path) -> None:
    spec = campaign_spec(tmp_path, plans=("last@3",))
    campaign(spec)
    workers = FakeWorkers(edited=frozenset({7}))
    campaign(spec, workers)
    assert workers.asked == [("tiny", "full", "shapes", 7), ("tiny", "last-3", "shapes", 7)]


def test_settings_that_decide_results_make_other_cells(tmp_path: Path) -> None:
    campaign(campaign_spec(tmp_path, plans=()))
    kwargs = {"gen_kwargs": {"max_new_tokens": 4}}
    for change in ({"seed": 1}, kwargs, {"dtype": "bfloat16"}, {"revision": "r"}):
        workers = FakeWorkers()
        campaign(campaign_spec(tmp_path, plans=(), **change), workers)
        assert workers.ran == ["tiny full shapes"]


def test_a_branch_that_moves_on_the_hub_makes_other_cells(tmp_path: Path) -> None:
    """Results belong to the commit that a revision named, and replicas load that commit."""
    workers = FakeWorkers(commits={None: "c1"})
    spec = campaign_spec(tmp_path, plans=("last@3",))
    campaign(spec, workers)
    campaign(spec, workers)
    assert len(workers.asked) == 120
    workers.commits = {None: "c2"}
    campaign(spec, workers)
    assert len(workers.asked) == 240 and workers.revisions == ["c1", "c2"]
    assert {row["revision"] for row in tables(tmp_path)["cells"]} == {"c2"}


def test_a_model_folder_is_known_by_its_content(tmp_path: Path) -> None:
    models = (str(tmp_path / "a"), str(tmp_path / "b"))
    for model in models:
        Path(model).mkdir()
        (Path(model) / "config.json").write_text("{}")
    workers = FakeWorkers()
    campaign(campaign_spec(tmp_path / "out", models=models, plans=()), workers)
    assert len(workers.asked) == 60 and len(tables(tmp_path / "out")["cells"]) == 2
    (tmp_path / "b" / "config.json").write_text("{ }")
    campaign(campaign_spec(tmp_path / "out", models=models[1:], plans=()), workers)
    assert len(workers.asked) == 120


def test_the_printed_table_and_its_verdicts(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "demo")
    workers = FakeWorkers(samples=400)
    plans = (f"sweep:{sweep}@3", "random:0..4@3", "first@3", "last@3")
    output = campaign(campaign_spec(tmp_path / "out", plans=plans), workers)
    assert len(workers.ran) == 8 and not any("last-3" in ran for ran in workers.ran)
    assert "freeze-visual-3 loses less than random: +0." in output
    assert "against the mean of 5 random controls" in output
    assert "last-3 is a tie with freeze-visual-3" in output
    found = tables(tmp_path / "out")
    rows = {row["plan"]: row for row in found["cells"]}
    assert rows["last-3"]["same_as"] == "freeze-visual-3" and rows["last-3"]["cell"] == rows["freeze-visual-3"]["cell"]
    compared = [row for row in found["comparisons"] if row["plan"] == "freeze-visual-3"]
    against = {row["against"]: row["against_value"] for row in compared if row["metric"] == "exact_match"}
    controls = [row["value"] for row in found["metrics"] if row["plan"].startswith("random")]
    assert set(against) == {"full", "mean of 5 random controls"}
    assert against["mean of 5 random controls"] == pytest.approx(sum(controls) / 5)
    (line,) = [line for line in output.splitlines() if line.strip("│ ").startswith("freeze-visual-3  ")]
    assert "0.62" in line and "25.0" in line  # prefill 5 ms of 8, 40 ms of the model's thread
    output = campaign(
        campaign_spec(tmp_path / "few", plans=(f"sweep:{sweep}@7", "random:1@7")), FakeWorkers(samples=12)
    )
    assert "freeze-visual-7 is no better than random" in output and "the mean of 1 random control" in output


def test_scores_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    campaign(campaign_spec(tmp_path, plans=("last@3",)), FakeWorkers(nan=True))
    found = tables(tmp_path)
    assert {row["n"] for row in found["comparisons"]} == {30}
    values = [score["value"] for row in found["answers"] for score in row["scores"]]
    assert None in values and all(value is None or value == value for value in values)


def test_what_cannot_be_right_is_refused_before_work_and_nothing_is_changed(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    before, workers = snapshot(tmp_path), FakeWorkers()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("out", {"models": ("nothing",)}, "nothing"),
        ("out", {"tasks": ("nothing",)}, "nothing"),
        ("out", {"models": ("L9",), "plans": ("llava-1.5-7b",)}, "llava-1.5-7b"),
        ("sweep", {}, "of kind 'sweep'"),
        ("other", {}, "thesis.txt"),
        ("file", {}, "file"),
    ]
    for name, change, message in cases:
        with pytest.raises(Refused, match=message):
            campaign(campaign_spec(tmp_path / name, **change), workers)
    assert workers.started == [] and snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_remote_folders(tmp_path: Path) -> None:
    spec = campaign_spec(Path("x"), plans=("last@3",), output_path=f"memory://{tmp_path.name}/campaign")
    first, workers = campaign(spec), FakeWorkers()
    assert last_table(campaign(spec, workers)) == last_table(first) and workers.ran == []
