"""The same service over what is no local folder."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import parquet as pq

from reports.service.tree import StoreTree
from tests.reports.runs import make_sweep
from tests.reports.service.asking import ask, ask_all, listed
from tests.reports.service.folders import make_campaign

ROOT = "memory://service-tests/runs"


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Iterator[Any]:
    """A sweep and a campaign in fsspec's memory."""
    make_sweep(tmp_path / "a")
    make_campaign(tmp_path / "team" / "c")
    memory = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            memory.pipe(f"/service-tests/runs/{path.relative_to(tmp_path)}", path.read_bytes())
    memory.pipe("/service-tests/secret/manifest.json", (tmp_path / "a" / "manifest.json").read_bytes())
    yield memory
    memory.rm("/service-tests", recursive=True)


def test_runs_of_a_store_are_listed(store: Any) -> None:
    runs = listed(ROOT)
    assert {name: (run["kind"], run["problems"]) for name, run in runs.items()} == {
        "a": ("sweep", []),
        "team/c": ("campaign", []),
    }


def test_tables_of_a_store_come_in_ranges(store: Any) -> None:
    path = "/runs/a/tables/samples.parquet"
    whole, part, last = ask_all(
        ROOT, [("GET", path, {"range": asked} if asked else {}) for asked in ("", "bytes=4-9", "bytes=-4")]
    )
    assert pq.read_table(io.BytesIO(whole.content)).num_rows == 3
    assert part.status_code == 206 and part.content == whole.content[4:10] and last.content == b"PAR1"
    assert ask(ROOT, "/runs/a/tables/lc_samples/part-00000.parquet").status_code == 200
    assert ask(ROOT, "/runs/a/plans/two.json").json()["name"] == "two"


def test_a_file_that_is_replaced_while_it_is_sent_breaks_the_answer(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = StoreTree.open
    monkeypatch.setattr(StoreTree, "open", lambda *names: replace(open_file(*names), changed=lambda: True))
    with pytest.raises(ConnectionAbortedError):
        ask(ROOT, "/runs/a/tables/samples.parquet")


def test_a_change_in_a_store_is_seen(store: Any) -> None:
    name = "/service-tests/runs/a/plans/two.json"
    first = ask(ROOT, "/runs/a/plans/two.json")
    store.pipe(name, first.content.replace(b'"two"', b'"ten"'))
    assert ask(ROOT, "/runs/a/plans/two.json").headers["etag"] != first.headers["etag"]
    store.pipe("/service-tests/runs/a/manifest.json", b"{")
    assert listed(ROOT)["a"]["state"] == "unreadable"


def test_nothing_outside_the_root_of_a_store_is_reached(store: Any) -> None:
    for way in ("..", "%2e%2e", "%252e%252e", "..%2f..", "%2fservice-tests"):
        assert ask(ROOT, f"/runs/{way}/secret/manifest.json").status_code == 404
