"""The driver's memory over a million answers: tables, comparisons and the page are made from the parts."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from reports.schemas import schema_of
from shortv.workers.campaign.producer import UnitResult
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import Unit
from tests.workers.campaign.fakes import FakePool, FakeTask, FakeWorkers, campaign, campaign_spec

ROOT = Path(__file__).resolve().parents[3]
PLANS = ("random:0..8@3", "first@3", "last@1,last@2,last@3,last@4,last@5", "last@3/drop-visual", "last@4/bypass-visual")
PLANS += ("last@2/no-visual-ffn", "last@3/no-visual-queries")
GIB = 2**30


class ManyDocuments(FakeTask):
    @cached_property
    def document_digests(self) -> NDArray[np.int64]:  # type: ignore[override]
        return np.arange(self.num_docs)


@dataclasses.dataclass(kw_only=True)
class ManyAnswers(FakeWorkers):
    """Answers of a hundred characters, with numbers and texts of their own in every row."""

    def task(self, name: str, spec: CampaignSpec) -> FakeTask:
        return ManyDocuments(name=name, num_docs=self.samples)

    @contextmanager
    def open(self, spec: CampaignSpec, tasks: Sequence[FakeTask]) -> Iterator[FakePool]:
        yield ManyPool(self, tasks)


class ManyPool(FakePool):
    async def run(self, unit: Unit) -> UnitResult:
        table = pa.concat_tables(_answers(unit, cell) for cell in unit.cells)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return UnitResult(part=bytes(sink.getvalue()), rows=len(table))


def _answers(unit: Unit, cell: Any) -> pa.Table:
    draw = np.random.default_rng([unit.docs[0], int(cell.cell[:8], 16)])
    docs, n = np.array(unit.docs, dtype=np.int32), len(unit.docs)
    right = draw.random(n) < 0.7
    scores = [[{"metric": "exact_match", "value": value}, {"metric": "f1", "value": value}] for value in right * 1.0]
    columns: dict[str, Any] = {name: [getattr(cell, name)] * n for name in ("cell", "model", "plan", "task")}
    columns |= {"doc": docs, "doc_digest": unit.digests, "sample_id": [f"sample-{doc}" for doc in docs]}
    columns |= {"prediction": [f"{doc} {yes} " * 8 for doc, yes in zip(docs, right, strict=True)], "scores": scores}
    columns |= {"target": [f"target of {doc}" for doc in docs], "kind": [f"kind {doc % 5}" for doc in docs]}
    columns |= {"values": [str(value) for value in right * 1.0], "prompt_tokens": [40] * n, "visual_tokens": [30] * n}
    columns |= {"completion_tokens": [2] * n, "prefill_batch": [16] * n}
    schema = schema_of("answers")
    arrays = []
    for field in schema:
        drawn = draw.random(n) * 100 if field.name.endswith("_ms") else [None] * n
        arrays.append(pa.array(columns.get(field.name, drawn), type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


@pytest.mark.slow
def test_a_million_answers_take_less_than_4_gib(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.workers.campaign.test_memory", str(tmp_path / "out"), "50000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    answers, peak = map(int, done.stdout.split())
    assert answers == 1_000_000 and peak < 4 * GIB
    assert (tmp_path / "out" / "report.html").stat().st_size < 5 * 2**20


def main(output: str, documents: str) -> None:
    """Run the campaign, and print its number of answers and the peak of this process's memory in bytes."""
    spec = campaign_spec(Path(output), plans=PLANS)
    campaign(spec, ManyAnswers(samples=int(documents)), page=True)
    rows = sum(pq.read_metadata(part).num_rows for part in Path(output, "answers").iterdir())
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(rows, 1024 * int(peak[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
