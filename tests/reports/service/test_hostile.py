"""Folders that somebody else wrote: each becomes one line in the list and one refusal of the job, at little cost."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from reports.page import build_page
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.errors import ShortVError
from tests.reports.runs import make_campaign, make_sweep
from tests.reports.service.asking import HTML, ask, listed
from tests.reports.service.folders import change_manifest, make_training

REPOSITORY = Path(__file__).resolve().parents[3]
HUGE = 10**400
DEEP: Any = "x"
for _ in range(800):
    DEEP = [DEEP]


def _plan(folder: Path, **changes: Any) -> None:
    path = folder / "plans" / "two.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _many_rows(folder: Path) -> None:
    table = pq.read_table(folder / "lc_layers.parquet").slice(0, 1)
    pq.write_table(pa.concat_tables([table] * 200_000).combine_chunks(), folder / "lc_layers.parquet")


def _bomb(folder: Path) -> None:
    """Write 40 rows of 8 MB that compress to a few kilobytes."""
    rows = pq.read_table(folder / "samples.parquet").to_pylist()[:1]
    table = pa.Table.from_pylist([rows[0] | {"prompt": "x" * 2**23}] * 40, schema=SCHEMAS["samples"])
    pq.write_table(table, folder / "samples.parquet", compression="zstd")


SWEEPS: dict[str, Callable[[Path], None]] = {
    "layers": lambda folder: change_manifest(folder, num_layers=999_999_999_999),
    "floor": lambda folder: change_manifest(folder, noise_floor=HUGE),
    "flops": lambda folder: _plan(folder, flops_ratio=HUGE),
    "threshold": lambda folder: _plan(
        folder, parts={"kind": "dyvte", "path": "p", "digest": "d" * 64, "threshold": HUGE}
    ),
    "details": lambda folder: change_manifest(folder, details={"x": DEEP}),
    "source": lambda folder: _plan(folder, source=DEEP),
    "digits": lambda folder: change_manifest(folder, counts={"used": HUGE}),
    "direction": lambda folder: change_manifest(folder, kl_direction="sideways"),
    "modes": lambda folder: change_manifest(folder, modes=[{}]),
    "mode": lambda folder: change_manifest(folder, modes=["freeze-nothing"]),
    "counts": lambda folder: change_manifest(folder, counts={"used": [1] * 9, "errors": "x"}),
    "stability": lambda folder: change_manifest(folder, stability={"freeze-visual": 1}),
    "versions": lambda folder: change_manifest(folder, versions={"x": DEEP}),
    "rows": _many_rows,
}
CAMPAIGNS: dict[str, Any] = {
    "models": {"models": [{}]},
    "plans": {"plans": [{"name": "full", "model": "org/m", "modes": 3, "kind": "full", "digest": 1}]},
    "modes": {"plans": [{"name": "full", "model": "org/m", "modes": [{}], "kind": "full", "digest": "d"}]},
    "parts": {"plans": [{"name": "full", "model": "m", "modes": [], "kind": "x", "digest": "", "parts": {"kind": []}}]},
    "tasks": {"tasks": [{"name": "shapes", "main_metric": DEEP[0][0]}]},
    "limit": {"arguments": {"limit": "many"}},
}


@pytest.fixture(autouse=True)
def _little_memory() -> Any:
    """Fail instead of taking the machine down: 20 GB were used where a set was built from a manifest's number."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("case", SWEEPS)
def test_a_hostile_sweep_is_a_line_of_the_list(tmp_path: Path, case: str) -> None:
    make_sweep(tmp_path / "good")
    make_sweep(tmp_path / case, details={"default_plan": "two"})
    SWEEPS[case](tmp_path / case)
    runs = listed(tmp_path)
    assert runs["good"]["problems"] == []
    assert case in ("direction", "stability", "versions", "mode") or runs[case]["problems"], runs[case]
    assert all("\n" not in problem and len(problem) < 1000 for problem in runs[case]["problems"])
    assert ask(tmp_path, "/", headers=HTML).status_code == 200
    assert ask(tmp_path, f"/runs/{case}/").status_code in (404, 422)


@pytest.mark.parametrize("case", CAMPAIGNS)
def test_a_hostile_campaign_is_a_line_of_the_list(tmp_path: Path, case: str) -> None:
    make_campaign(tmp_path / "c")
    change_manifest(tmp_path / "c", **CAMPAIGNS[case])
    assert set(listed(tmp_path)) == {"c"} and ask(tmp_path, "/", headers=HTML).status_code == 200


def test_a_training_of_any_counts_is_a_line_of_the_list(tmp_path: Path) -> None:
    make_training(tmp_path / "t")
    change_manifest(tmp_path / "t", counts={"steps": [1]}, details={"loss": HUGE})
    assert listed(tmp_path)["t"]["problems"]


@pytest.mark.parametrize("kind", ["sweep", "campaign"])
def test_the_job_refuses_each_hostile_folder_in_one_line(tmp_path: Path, kind: str) -> None:
    folders = {}
    for case, spoil in SWEEPS.items() if kind == "sweep" else ():
        make_sweep(tmp_path / case)
        spoil(tmp_path / case)
        folders[case] = tmp_path / case
    for case, changes in CAMPAIGNS.items() if kind == "campaign" else ():
        make_campaign(tmp_path / case)
        change_manifest(tmp_path / case, **changes)
        folders[case] = tmp_path / case
    code = "import sys\nfrom jobs.common import run\nfrom jobs.report import main\n"
    code += "for name in sys.argv[1:]:\n    sys.argv[1:] = [name]\n    try:\n        run(main)\n"
    code += "    except SystemExit as end:\n        print('STATUS', name, end.code, flush=True, file=sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders.values())],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    statuses = [line.split()[-1] for line in lines if line.startswith("STATUS")]
    assert len(statuses) == len(folders) and set(statuses) <= {"0", "2"}, done.stderr
    # A refusal is one line; what can be drawn all the same is drawn.
    assert len(lines) == len(statuses) + statuses.count("2"), done.stderr


def test_decoded_bytes_count_and_not_those_of_the_file(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    _bomb(tmp_path / "a")
    assert (tmp_path / "a" / "samples.parquet").stat().st_size < 2**20
    assert listed(tmp_path)["a"]["state"] == "complete"


@pytest.mark.parametrize("name", ["manifest.json", "lc_layers.parquet", "samples.parquet", "plans/two.json"])
def test_a_file_larger_than_memory_is_refused_everywhere(tmp_path: Path, name: str) -> None:
    make_sweep(tmp_path / "a")
    os.truncate(tmp_path / "a" / name, 20 * 2**30)
    with pytest.raises(ShortVError) as error:
        build_page(Folder(tmp_path / "a"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert listed(tmp_path)["a"]["problems"]


def test_entries_that_are_not_followed_are_named(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    (tmp_path / "a" / "plans").rename(tmp_path / "plans")
    (tmp_path / "a" / "plans").symlink_to(tmp_path / "plans")
    (tmp_path / "a" / "report.html").symlink_to(tmp_path / "plans" / "two.json")
    problems = listed(tmp_path)["a"]["problems"]
    assert {problem.split()[0] for problem in problems} == {"a/plans", "a/report.html"}
    assert ask(tmp_path, "/runs/a/plans/two.json").status_code == 404
