"""Sweeps on Ray with a fake engine: every failure leaves each sample used or in the errors, and the same tables."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reports.manifest import State, SweepManifest
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.workers.shipping import CHUNK, folder_digest, offer
from shortv.workers.sweep import driver
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.pipeline import stream_results
from tests.workers.fakes import FakeEngine, make_spec, run_units_here, tables

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The tables of the same sweep in one process, without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "run_units", run_units_here)
        assert run_sweep(make_spec(folder), engine=FakeEngine()) == 0
    return tables(folder / "out")


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_leaves_the_same_tables(tmp_path: Path, reference: dict[str, Any]) -> None:
    request = make_spec(tmp_path)
    assert run_sweep(request, engine=FakeEngine(kills_once=tmp_path / "killed")) == 0
    assert (tmp_path / "killed").exists()
    assert tables(request.output_path) == reference


@pytest.mark.usefixtures("local_ray")
def test_each_bad_sample_is_named_and_takes_no_other_with_it(tmp_path: Path, reference: dict[str, Any]) -> None:
    engine = FakeEngine(
        kills=frozenset({"s03"}),
        preparing_kills=frozenset({"s10"}),
        raises=frozenset({"s06"}),
        unusable=frozenset({"s08"}),
    )
    request = make_spec(tmp_path, batch_size=4)
    assert run_sweep(request, engine=engine) == 3
    found = tables(request.output_path)
    bad = {"s03": "process-died", "s06": "RuntimeError", "s08": "fake", "s10": "process-died"}
    assert {row["sample_id"]: row["error"] for row in found["errors"]} == bad
    assert all("\n" not in row["message"] for row in found["errors"])
    for name in ("samples", "lc_samples"):
        assert found[name] == [row for row in reference[name] if row["sample_id"] not in bad]
    assert SweepManifest.load(Folder(request.output_path)).state is State.PARTIAL
    # A finished command does nothing and repeats its status; a tolerated share counts as success.
    assert run_sweep(request, engine=FakeEngine(broken=True)) == 3
    assert run_sweep(make_spec(tmp_path, batch_size=4, fail_on_error=0.4), engine=engine) == 0
    with pytest.raises(Refused, match=r"another sweep \(batch-size 4 there, 3 here\)"):
        run_sweep(make_spec(tmp_path, batch_size=3), engine=engine)


@pytest.mark.usefixtures("local_ray")
def test_a_model_folder_reaches_a_node_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "weights").write_bytes(os.urandom(CHUNK + 5))
    (tmp_path / "model" / "empty").touch()
    shipped = offer(str(tmp_path / "model"))
    assert shipped is not None and shipped.local() == tmp_path / "model"
    with monkeypatch.context() as patch:
        found = iter([None, shipped.digest])
        patch.setattr("shortv.workers.shipping.folder_digest", lambda name: next(found))
        copy = shipped.local()
    assert copy != tmp_path / "model" and folder_digest(copy) == shipped.digest
    shutil.rmtree(copy)
    (tmp_path / "model" / "empty").write_text("now it is not")
    with pytest.raises(ShortVError, match="has changed"):
        shipped.local()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (FakeEngine(broken=True), "no file named"),
        pytest.param(FakeEngine(dies_loading=True), "died while loading", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_sweep_in_one_line(
    tmp_path: Path, engine: FakeEngine, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def watched(*arguments: Any, **more: Any) -> Iterator[Any]:
        try:
            yield from stream_results(*arguments, **more)
        finally:
            closed.append(True)

    monkeypatch.setattr(driver, "stream_results", watched)
    request = make_spec(tmp_path, samples=4)
    with pytest.raises(ShortVError, match=reason) as caught:
        run_sweep(request, engine=engine)
    assert closed, "Ray Data is left to the garbage collector, after Ray"
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert SweepManifest.load(Folder(request.output_path)).state is State.RUNNING


DRIVER = """
import sys
from pathlib import Path
from shortv.errors import ShortVError
from shortv.workers.cluster import start
from shortv.workers.sweep.driver import run_sweep
from tests.workers.fakes import FakeEngine, make_spec
start(num_cpus=4, log_to_driver=False, logging_level="ERROR")
try:
    run_sweep(make_spec(Path(sys.argv[1])), engine=FakeEngine(seconds=2.0))
except ShortVError as error:
    sys.exit(error.exit_status)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_killed_drivers_are_continued_with_other_workers(tmp_path: Path, reference: dict[str, Any]) -> None:
    progress = tmp_path / "out" / "progress"
    # SIGTERM is what `ray job stop` sends; its exit status is the shell's for it.
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        before = len(list(progress.glob("*.parquet")))
        driving = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while len(list(progress.glob("*.parquet"))) == before:
            assert driving.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        driving.send_signal(number)
        assert driving.wait(timeout=300) == status
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["state"] == "running"
    assert len(list(progress.glob("*.parquet"))) < 6
    request = make_spec(tmp_path, workers=3)
    assert run_sweep(request, engine=FakeEngine()) == 0
    assert not progress.exists()
    assert tables(request.output_path) == reference
