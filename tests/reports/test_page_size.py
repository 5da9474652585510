"""Pages of large runs: under 5 MB, built in under 1 GB."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from reports.manifest import CampaignManifest
from tests.reports.runs import MODES, change_manifest, keep_answers, make_campaign, make_sweep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import re, sys, time
from pathlib import Path
start = time.perf_counter()
from reports.page import write_page
from reports.store import Folder
folder = Folder(sys.argv[1])
if folder.exists("cells.parquet"):
    from reports.answers import Answers
    from reports.changes import Compared, changes, documents_of, with_questions
    cells = {row["plan"]: row["cell"] for row in folder.read_table("cells").to_pylist()}
    rows = changes(Answers(folder), [Compared("org/m", "shapes", "exact_match", cells)])
    same = {"task": "shapes", "question": "Which colour has the circle? " * 12}
    shown = [
        {**same, "doc": doc, "sample_id": str(doc), "image": doc.to_bytes(4, "big") * 750}
        for doc in documents_of(rows)["shapes"]
    ]
    folder.write_table("changes", with_questions(rows, shown))
    folder.write_table("thumbnails", shown)
write_page(folder)
# Not ru_maxrss, which a process inherits from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(time.perf_counter() - start, int(peak[1]) / 1024)
"""
DOCS, DOCS_PER_PART = 250_000, 500


def _check_page(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    size = (folder / "report.html").stat().st_size
    print(f"page of {size / 1e6:.2f} MB, built in {seconds:.1f} s and {megabytes:.0f} MB")
    assert size < 5e6 and megabytes < 1000


@pytest.mark.slow
def test_the_page_of_a_large_sweep(tmp_path: Path) -> None:
    make_sweep(tmp_path, samples=10_000, layers=32, modes=MODES)
    _check_page(tmp_path)


@pytest.mark.slow
def test_the_page_of_a_campaign_with_a_million_answers(tmp_path: Path) -> None:
    folder = make_campaign(tmp_path)
    keep_answers(folder, lambda row: row["doc"] == 0)
    answers, random = folder.read_table("answers/part-000000"), np.random.default_rng(0)
    rows = answers.take(np.repeat(np.arange(len(answers)), DOCS_PER_PART)).to_pydict()
    for part in range(DOCS // DOCS_PER_PART):
        doc_R = np.tile(np.arange(DOCS_PER_PART, dtype=np.int32), len(answers)) + part * DOCS_PER_PART
        score_R = random.integers(2, size=len(doc_R)).tolist()
        rows |= {"doc": doc_R, "sample_id": [f"s{doc}" for doc in doc_R]}
        rows["prediction"] = [f"an answer of some length, and a score of {score}" for score in score_R]
        rows["scores"] = [[{"metric": "exact_match", "value": score}] for score in score_R]
        folder.write_table(f"answers/part-{part:06d}", pa.table(rows, schema=answers.schema))
    cells = folder.read_table("cells").to_pylist()
    folder.write_table("cells", [cell | {"n": DOCS} for cell in cells])
    tasks = [dict(task) | {"num_docs": DOCS} for task in CampaignManifest.load(folder).tasks]
    counts = {"cells": len(cells), "samples": DOCS * len(cells), "errors": 0}
    change_manifest(tmp_path, tasks=tasks, counts=counts)
    _check_page(tmp_path)
    assert "have fewer samples" not in (tmp_path / "report.html").read_text("utf-8")
    assert len(folder.read_table("changes")) == 150
