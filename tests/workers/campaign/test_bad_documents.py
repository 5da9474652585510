"""Documents that a task's code, an image or an answer makes unusable: one error each, and the rest goes on."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.workers.campaign.fakes import campaign, campaign_spec, tables
from tests.workers.campaign.local import LocalWorkers

TASK = """
task: bad
dataset_path: parquet
dataset_kwargs: {data_files: {test: bad.parquet}}
test_split: test
output_type: generate_until
doc_to_text: !function bad.text
doc_to_visual: !function bad.visual
doc_to_messages: !function bad.messages
doc_to_target: !function bad.target
process_results: !function bad.score
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
"""
CODE = """
def text(doc):
    if doc["fault"] == "prompt":
        raise KeyError("question")
    return f"What is on {doc['id']}?"

def visual(doc):
    return [doc["image"].convert("RGB")]

def messages(doc):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": text(doc)}]
    return [{"role": "user", "content": content}]

def target(doc):
    return doc["no such column"] if doc["fault"] == "target" else "red"

def score(doc, results):
    if doc["fault"] == "score":
        raise ZeroDivisionError("of the task")
    return {"right": float(len(results[0]))}
"""
FAULTS = ["", "prompt", "no image", "cut image", "score", "target", "other file", ""]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with a document for each fault."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder, stream = tmp_path_factory.mktemp("bad"), io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(stream, "PNG")
    whole = stream.getvalue()
    images = {"no image": None, "cut image": whole[:20], "other file": b"%!PS-Adobe-3.0 EPSF-3.0"}
    features = Features({"id": Value("string"), "fault": Value("string"), "image": ImageFeature()})
    rows = [
        {
            "id": f"d{at}",
            "fault": fault,
            "image": {"bytes": data, "path": None} if (data := images.get(fault, whole)) else None,
        }
        for at, fault in enumerate(FAULTS)
    ]
    table = Dataset.from_list(rows, features=features)
    pq.write_table(table.data.table, folder / "bad.parquet")
    (folder / "bad.yaml").write_text(TASK)
    (folder / "bad.py").write_text(CODE)
    return folder


def test_documents_that_fail_are_one_error_each_and_the_rest_goes_on(task: Path, tmp_path: Path) -> None:
    workers = LocalWorkers()
    spec = campaign_spec(
        tmp_path / "out", tasks=("bad", "shapes_vqa"), include_path=(str(task),), plans=("last@3",), limit=8
    )
    said = campaign(spec, workers, status=3)
    found = tables(tmp_path / "out")
    bad = [row for row in found["answers"] if row["task"] == "bad"]
    errors = {FAULTS[row["doc"]]: row["error"] for row in bad if row["plan"] == "last-3"}
    assert len(bad) == 2 * len(FAULTS) and set(errors) == set(FAULTS)
    assert {fault for fault, error in errors.items() if error} == {
        "prompt",
        "no image",
        "cut image",
        "score",
        "other file",
    }
    assert all(row["scores"] == [] for row in bad if row["error"])
    counted = {row["metric"]: row["n"] for row in found["metrics"]}
    assert (counted["right"], counted["exact_match"]) == (3, 8)
    assert said.count("5 of 8 samples failed; the first, 'd1': answer: document 1 gives no prompt: KeyError") == 2
    assert not any("\n" in error for error in errors.values() if error)
