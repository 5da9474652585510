"""jobs/bench.py as users run it; GPU machines have no Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import bench as job
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
        (["--shape", "llava-2"], "unknown shape 'llava-2'; the shapes are llava-1.5-7b"),
        (["--layers", "40"], "llava-1.5-7b has 32"),
        (["--layers", "4", "--frozen", "5"], "5 frozen of 4 layers"),
    ],
)
def test_prefill_refuses_what_it_cannot_build(arguments: list[str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        job.main(["prefill", *arguments], standalone_mode=False)
