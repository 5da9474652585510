"""Training folders in the list, and their downloads."""

import io
from pathlib import Path

from pyarrow import parquet as pq

from tests.reports.service.asking import HTML, ask, listed
from tests.reports.service.folders import change_manifest, make_training


def test_a_training_is_listed_with_its_numbers(tmp_path: Path) -> None:
    make_training(tmp_path / "dyvte")
    run = listed(tmp_path)["dyvte"]
    assert (run["kind"], run["state"], run["problems"]) == ("training", "complete", [])
    assert (run["models"], run["parts"], run["page"]) == (["org/m"], ["dyvte"], None)
    assert run["headline"] == {"steps": 3, "loss": 0.0775, "train_seconds": 112.0, "learned_parameters": 132_096}
    assert [item["path"] for item in run["tables"]] == ["tables/training.parquet"]
    assert run["plan_files"] == ["plans/dyvte-0.5.json"]
    text = ask(tmp_path, "/", headers=HTML).text
    assert "0.0775 after 3 steps" in text and "132,096" in text and "no page" in text
    assert 'href="runs/dyvte/"' not in text


def test_its_table_and_plans_are_handed_out_and_a_page_is_not(tmp_path: Path) -> None:
    make_training(tmp_path / "dyvte")
    assert pq.read_table(io.BytesIO(ask(tmp_path, "/runs/dyvte/tables/training.parquet").content)).num_rows == 3
    assert ask(tmp_path, "/runs/dyvte/plans/dyvte-0.5.json").json()["name"] == "dyvte-0.5"
    page = ask(tmp_path, "/runs/dyvte/")
    assert page.status_code == 404 and "is a training, which has no page" in page.json()["error"]["message"]
    for path in ("parts/parts.safetensors", "parts/parts.json", "tables/parts", "checkpoint/state.safetensors"):
        assert ask(tmp_path, f"/runs/dyvte/{path}").status_code == 404


def test_a_training_that_is_not_finished_is_labelled(tmp_path: Path) -> None:
    make_training(tmp_path / "dyvte", state="running", finished=None)
    run = listed(tmp_path)["dyvte"]
    assert run["state"] == "running" and run["headline"] == {} and run["problems"] == []
    assert "This run is not finished" in ask(tmp_path, "/", headers=HTML).text


def test_what_a_training_lacks_is_named(tmp_path: Path) -> None:
    make_training(tmp_path / "a")
    change_manifest(tmp_path / "a", counts={"steps": 5, "samples": 48, "errors": 2})
    (tmp_path / "a" / "parts" / "parts.json").write_text("{")
    parts, *others = listed(tmp_path)["a"]["problems"]
    assert "a/parts/parts.json is not valid JSON" in parts
    assert others == [
        "errors.parquet is missing although the run has ended",
        "a/training.parquet has 3 rows, and 5 by the counts of the manifest",
    ]
    change_manifest(tmp_path / "a", schema_version=2)
    assert "schema version 2, this release reads 1" in listed(tmp_path)["a"]["problems"][0]
    change_manifest(tmp_path / "a", schema_version=1, details={"loss": "low"})
    assert any("no job writes" in problem for problem in listed(tmp_path)["a"]["problems"])
