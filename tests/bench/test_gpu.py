"""The GPU benchmarks write one table; on a CPU they run at the size of a test model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortv.bench import device, prefill, training
from shortv.bench.gpu import Case, SweepCase, bench_gpu, write_results
from shortv.bench.models import MODELS, PublishedModel
from shortv.errors import Refused


def test_every_benchmark_gives_a_row_and_a_failure_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(device, "_COPY_BYTES", {"cpu": 2**16})
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    small = PublishedModel(
        kind="llava", text={**text, "vocab_size": 32064}, frozen=1, visual_tokens=576, real_tower=False
    )
    monkeypatch.setitem(MODELS, "small", small)
    cases: list[Case] = [
        prefill.PrefillCase(shape="small", vision_tower=True, pairs=1),
        prefill.PrefillCase(shape="small", layers=9),
        training.Case(shape="small", pairs=1),
        SweepCase(limit=2, batch_size=2, repeats=1),
    ]
    rows = bench_gpu(cases, device="cpu", report=str)
    markdown, data = write_results(rows, tmp_path, device="cpu")
    listed = json.loads(data.read_text())["rows"]
    assert [row["benchmark"] for row in listed if not row["error"]] == ["prefill", *["training"] * 2, *["sweep"] * 3]
    assert all(row["ratio"] > 0 for row in listed if not row["error"])
    assert [row["case"] for row in listed if row["error"]] == [str(cases[1])]
    assert len(markdown.read_text().splitlines()) == 4 + len(listed)


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refused, match="cuda"):
        bench_gpu([], device="cuda", report=str)
