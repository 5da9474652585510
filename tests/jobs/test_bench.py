"""jobs/bench.py as users run it; GPU machines have no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.bench import main as job
from shortv.bench import gpu, measuring
from shortv.bench.models import MODELS, PublishedModel
from shortv.bench.specs import BENCHMARKS, PrefillBench, SweepBench, TrainingBench
from shortv.errors import Refused

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None
sys.argv[0] = "jobs/bench.py"
runpy.run_path("jobs/bench.py", run_name="__main__")
"""


def bench(output: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark as a script without Ray and return its rows."""
    command = [sys.executable, "-c", WITHOUT_RAY, *arguments, "--output-path", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["rows"]
    assert all(row["case"] in done.stdout for row in rows)
    return rows


def test_a_sweep_has_half_the_layer_passes_without_ray(tmp_path: Path) -> None:
    rows = bench(tmp_path, "sweep", "--limit", "2", "--repeats", "1", "--batch-size", "2")
    passes = [row["figures"]["layer_passes"] for row in rows]
    assert passes == [2 * 8 * 9] * 2 + [2 * 8 * 9 // 2] * 3
    assert all(row["case"].startswith("2 samples, 8 layers") and row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prefill", "--layers", "40"], "llava-1.5-7b has 32"),
        (["prefill", "--layers", "4", "--frozen", "5"], "5 frozen of 4 layers"),
        (["prefill", "--batch_size", "0"], "--batch-size is '0'"),
        (["sizing", "--shape", "llava-2"], "llava-2"),
        (["training", "--shape", "qwen2.5-vl-7b"], "qwen2.5-vl-7b"),
        (["campaign", "--limit", "1001"], "--limit is '1001'"),
        (["scheduling", "--workers", "1,a"], "--workers is 'a'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        job.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("name", [*BENCHMARKS, "tables"])
def test_help(name: str) -> None:
    assert CliRunner().invoke(job, [name, "--help"]).exit_code == 0


def test_all_gpu_benchmarks_give_rows_and_a_failure_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(measuring, "_COPY_BYTES", {"cpu": 2**16})
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32064}
    small = PublishedModel(kind="llava", text=text, frozen=1, visual_tokens=576, real_tower=False)
    monkeypatch.setitem(MODELS, "small", small)
    cases = (
        ("prefill", PrefillBench(shape="small", vision_tower=True, pairs=1)),
        ("prefill", PrefillBench(shape="small", layers=9)),
        ("training", TrainingBench(shape="small", pairs=1)),
        ("sweep", SweepBench(limit=2, batch_size=2, repeats=1)),
    )
    monkeypatch.setattr(gpu.bench, "__defaults__", (cases,))
    arguments = ["gpu", "--device", "cpu", "--output-path", str(tmp_path)]
    done = CliRunner().invoke(job, arguments, standalone_mode=False)
    assert done.return_value == 3, done.exception
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    measured = [row for row in rows if not row["error"]]
    assert [row["benchmark"] for row in measured] == ["prefill", *["training"] * 2, *["sweep"] * 5]
    assert all(row["ratio"] > 0 for row in measured)
    assert [row["error"] for row in rows if row["error"]] == ["4 frozen of 9 layers cannot be: small has 2"]
    assert len((tmp_path / "results.md").read_text().splitlines()) == 4 + len(rows)


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Refused, match="cuda"):
        job.main(["gpu"], standalone_mode=False)


@pytest.mark.slow
def test_sizing_predicts_what_is_measured(tmp_path: Path) -> None:
    """The model is small, so the bounds are wide; docs/cluster.md has a run of real size."""
    sizes = ["--shape", "smollm2-135m", "--layers", "2", "--visual-tokens", "192", "--stack", "3", "--repeats", "1"]
    [row] = bench(tmp_path, "sizing", *sizes)
    figures = row["figures"]
    assert figures["predicted_stack"] == figures["stack"] == 3
    assert 0.9 < figures["weights_gib"] / figures["predicted_weights_gib"] < 1.2
    assert 0.7 < figures["measured_gib"] / figures["predicted_gib"] < 1.6
