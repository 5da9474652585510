"""The page of a 10,000-sample x 32-layer sweep of every mode: under 5 MB, built in under 1 GB."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports.runs import MODES, make_sweep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import re, sys, time
from pathlib import Path
start = time.perf_counter()
from reports.page import write_page
from reports.store import Folder
write_page(Folder(sys.argv[1]))
# Not ru_maxrss, which a process inherits from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(time.perf_counter() - start, int(peak[1]) / 1024)
"""


@pytest.mark.slow
def test_the_page_of_a_large_sweep(tmp_path: Path) -> None:
    make_sweep(tmp_path, samples=10_000, layers=32, modes=MODES)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, done.stdout.split())
    size = (tmp_path / "report.html").stat().st_size
    print(f"page of {size / 1e6:.2f} MB, built in {seconds:.1f} s and {megabytes:.0f} MB")
    assert size < 5e6 and megabytes < 1000
