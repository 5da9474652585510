"""jobs/bench.py as users run it; GPU machines have no Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.bench import bench as job
from shortv.bench.models import MODELS, PublishedModel
from shortv.errors import Refused

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None
sys.argv[0] = "jobs/bench.py"
runpy.run_path("jobs/bench.py", run_name="__main__")
"""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_sweep_prints_half_the_layer_passes_without_ray() -> None:
    done = bench("sweep", "--limit", "3", "--repeats", "1", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3 samples, 8 layers")
    passes = {int(line.split()[-4]) for line in lines[2:]}
    assert passes == {3 * 8 * 9, 3 * 8 * 9 // 2}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layers", "40"], "llava-1.5-7b has 32"),
        (["--layers", "4", "--frozen", "5"], "5 frozen of 4 layers"),
    ],
)
def test_prefill_refuses_what_it_cannot_build(arguments: list[str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        job.main(["prefill", *arguments], standalone_mode=False)


def test_training_prints_both_stages_and_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    sizes = {**small, "vocab_size": 32064}
    monkeypatch.setitem(MODELS, "small", PublishedModel(kind="llava", text=sizes, frozen=1, visual_tokens=576))
    done = CliRunner().invoke(job, ["training", "--shape", "small", "--pairs", "1"], standalone_mode=False)
    assert done.return_value == 0, done.exception
    where, head, projectors, joint, flops = done.output.splitlines()
    assert where == "small, 2 layers, batch 1, t = 64, v = 576, float32 on cpu" and head.endswith("of dense")
    assert float(projectors.split()[-1]) > 0 and float(joint.split()[-1]) > 0
    assert 0 < float(flops.split()[-1]) < 1


@pytest.mark.parametrize("command", ["prefill", "sizing", "training"])
def test_an_unknown_shape_is_refused(command: str) -> None:
    with pytest.raises(Refused, match="llava-2"):
        job.main([command, "--shape", "llava-2"], standalone_mode=False)


@pytest.mark.slow
def test_sizing_prints_what_was_predicted_and_what_was_measured() -> None:
    """The model is small, so the bounds are wide; docs/cluster.md has a run of real size."""
    done = bench(
        "sizing", "--shape", "smollm2-135m", "--layers", "2", "--visual-tokens", "192", "--stack", "3", "--repeats", "1"
    )
    assert done.returncode == 0, done.stderr
    where, limits, head, *rows = done.stdout.splitlines()
    assert where == "smollm2-135m, 2 layers, batch 2, t = 64, v = 192, float32 on cpu"
    assert limits.startswith("stacked ablations: 3 predicted, 3 run; ") and limits.endswith(" GFLOP/s")
    assert head.split() == ["predicted", "measured", "of", "predicted"]
    found = {row[:24].strip(): [float(cell) for cell in row[24:].split()] for row in rows}
    assert list(found) == ["weights, GiB", "work of the sweep, GiB", "in all, GiB", "seconds"]
    for name, (predicted, measured, ratio) in found.items():
        assert ratio == pytest.approx(measured / predicted, rel=0.05), name
    assert 0.8 < found["weights, GiB"][2] < 1.3
    assert 0.7 < found["in all, GiB"][2] < 1.6
