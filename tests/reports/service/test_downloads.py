"""Tables and plans as downloads, from a local folder and from a store: whole, in ranges, and under conditions."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import parquet as pq

from reports.schemas import SCHEMAS
from reports.service.tree import StoreTree
from tests.reports.runs import cut, make_campaign, make_sweep
from tests.reports.service.asking import ask, ask_all, listed

TABLE = "/runs/a/tables/samples.parquet"
STORE = "memory://service-tests/runs"


@pytest.fixture(name="root", scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep in several parts, and a campaign further down."""
    root = tmp_path_factory.mktemp("root")
    make_sweep(root / "a", rows_per_part=10)
    make_campaign(root / "team" / "c", failed=1)
    return root


@pytest.fixture(name="store")
def _store(root: Path) -> Iterator[Any]:
    """The same in fsspec's memory, and beside it what is not served."""
    memory = fsspec.filesystem("memory")
    for path in root.rglob("*.*"):
        memory.pipe(f"/service-tests/runs/{path.relative_to(root)}", path.read_bytes())
    memory.pipe("/service-tests/secret/manifest.json", (root / "a" / "manifest.json").read_bytes())
    yield memory
    memory.rm("/service-tests", recursive=True)


def test_a_table_comes_whole_and_head_says_the_same_without_it(root: Path) -> None:
    data = (root / "a" / "samples.parquet").read_bytes()
    response, head = ask_all(root, [("GET", TABLE, {}), ("HEAD", TABLE, {"range": "bytes=0-3"})])
    assert response.status_code == head.status_code == 200 and response.content == data and not head.content
    own = {"x-request-id": ""}
    assert dict(head.headers) | own == dict(response.headers) | own
    assert response.headers["content-length"] == str(len(data))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"].startswith('attachment; filename="a-samples.parquet"')
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert pq.read_table(io.BytesIO(response.content)).schema.equals(SCHEMAS["samples"])


@pytest.mark.parametrize("place", ["local", "store"])
@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-", 10, None),
        ("bytes=-8", -8, None),
        ("bytes=5-99999999", 5, None),
        ("bytes=-99999999", 0, None),
        ("Bytes = 2 - 3", 2, 4),
    ],
)
def test_a_range_comes_alone(root: Path, store: Any, place: str, asked: str, start: int, stop: int | None) -> None:
    data = (root / "a" / "samples.parquet").read_bytes()
    response, whole = ask_all(
        root if place == "local" else STORE, [("GET", TABLE, {"range": asked}), ("GET", TABLE, {})]
    )
    places = range(len(data))[start:stop]
    assert response.status_code == 206 and response.content == data[start:stop] and whole.content == data
    assert response.headers["content-range"] == f"bytes {places[0]}-{places[-1]}/{len(data)}"
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["etag"] == whole.headers["etag"]


def test_ranges_beyond_the_end_and_other_methods_are_refused_and_other_ranges_ignored(root: Path) -> None:
    size = (root / "a" / "samples.parquet").stat().st_size
    for asked in ("bytes=99999999-", "bytes=-0", "bytes=99999999-999999999"):
        response = ask(root, TABLE, headers={"range": asked})
        assert response.status_code == 416 and response.headers["content-range"] == f"bytes */{size}"
        assert response.json()["error"]["code"] == "no_such_range"
    for asked in ("bytes=0-1,3-4", "lines=0-1", "bytes=-", "bytes=a-b", "bytes=5-2", f"bytes={'9' * 5000}-"):
        response = ask(root, TABLE, headers={"range": asked})
        assert response.status_code == 200 and len(response.content) == size
    other = ask(root, TABLE, method="DELETE")
    assert other.status_code == 405 and other.headers["allow"]


def test_conditions(root: Path) -> None:
    etag = ask(root, TABLE).headers["etag"]
    expected: list[tuple[dict[str, str], int]] = [
        ({"if-none-match": etag}, 304),
        ({"if-none-match": f'"x", W/{etag}'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x"'}, 200),
        ({"if-none-match": etag, "range": "bytes=0-3"}, 304),
        ({"if-range": etag, "range": "bytes=0-3"}, 206),
        ({"if-range": f"W/{etag}", "range": "bytes=0-3"}, 200),
        ({"if-range": "Wed, 21 Oct 2026 07:28:00 GMT", "range": "bytes=0-3"}, 200),
        ({"if-match": etag}, 200),
        ({"if-match": '"x"'}, 412),
        ({"if-match": f"W/{etag}"}, 412),
    ]
    for method in ("GET", "HEAD"):
        found = ask_all(root, [(method, TABLE, headers) for headers, _ in expected])
        wanted = [status if (method, status) != ("HEAD", 206) else 200 for _, status in expected]
        assert [response.status_code for response in found] == wanted
        assert all(not response.content for response in found if response.status_code == 304)


def test_no_byte_is_read_before_the_first_is_sent(tmp_path: Path) -> None:
    """A table of any size: only its footer is read, and the entity tag changes with the file."""
    make_sweep(tmp_path / "a")
    path = tmp_path / "a" / "samples.parquet"
    first = ask(tmp_path, TABLE).headers["etag"]
    os.utime(path, (1e9, 1e9))
    second = ask(tmp_path, TABLE).headers["etag"]
    assert first != second == ask(tmp_path, TABLE).headers["etag"]
    data = path.read_bytes()
    with path.open("wb") as file:
        # A terabyte of nothing before a footer that is whole.
        file.write(b"PAR1")
        file.seek(2**40)
        file.write(data[4:])
    response = ask(tmp_path, TABLE, headers={"range": "bytes=0-3"})
    assert response.status_code == 206 and response.content == b"PAR1"


def test_every_table_is_listed_and_comes_part_by_part(root: Path) -> None:
    found = ask(root, "/runs/team/c/tables").json()["files"]
    assert {item["table"] for item in found} == {"cells", "metrics", "comparisons", "speed", "answers"}
    parts = ask(root, "/runs/a/tables/lc_samples").json()["files"]
    assert [item["path"] for item in parts] == [f"tables/lc_samples/part-0000{part}.parquet" for part in range(3)]
    for run, items in (("team/c", found), ("a", parts)):
        for item in items:
            # The page links to the files where they lie.
            name = item["path"].removeprefix("tables/")
            one, other = ask_all(root, [("GET", f"/runs/{run}/{path}", {}) for path in (item["path"], name)])
            assert one.content == other.content == (root / run / name).read_bytes()
            assert pq.read_table(io.BytesIO(one.content)).num_rows == item["rows"]
    whole = ask(root, "/runs/a/tables/lc_samples.parquet")
    assert whole.status_code == 404
    assert "lc_samples has 3 parts; GET /runs/a/tables/lc_samples lists them" in whole.json()["error"]["message"]


def test_the_only_part_of_a_table_is_the_table(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    part = tmp_path / "a" / "lc_samples" / "part-00000.parquet"
    for path in ("tables/lc_samples.parquet", "lc_samples.parquet"):
        response = ask(tmp_path, f"/runs/a/{path}")
        assert response.status_code == 200 and response.content == part.read_bytes()
        assert "a-lc_samples-part-00000.parquet" in response.headers["content-disposition"]
    part.write_bytes(b"PAR1")
    assert ask(tmp_path, "/runs/a/tables/lc_samples.parquet").status_code == 422


@pytest.mark.parametrize("state", ["running", "partial"])
def test_downloads_and_their_list_say_the_state(tmp_path: Path, state: str) -> None:
    make_sweep(tmp_path / "a", state=state)
    for path in ("tables/samples.parquet", "tables/lc_samples/part-00000.parquet", "plans/two.json", "manifest.json"):
        for method, headers in (("GET", {}), ("HEAD", {}), ("GET", {"range": "bytes=0-3"})):
            assert ask(tmp_path, f"/runs/a/{path}", method=method, headers=headers).headers["x-run-state"] == state
    assert ask(tmp_path, "/runs/a/tables").json()["state"] == state


def test_a_comparison_is_served_where_there_is_one(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    missing = ask(tmp_path, "/runs/a/report-against.html")
    assert missing.status_code == 404 and "FOLDER/a --against OTHER" in missing.json()["error"]["message"]
    assert "comparison" not in ask(tmp_path, "/").text and listed(tmp_path)["a"]["page_against"] is None
    page = "<html><body>moved</body></html>"
    (tmp_path / "a" / "report-against.html").write_text(page)
    response = ask(tmp_path, "/runs/a/report-against.html")
    assert response.text == page and "sandbox" in response.headers["content-security-policy"]
    assert listed(tmp_path)["a"]["page_against"] == "runs/a/report-against.html"
    assert '<a href="runs/a/report-against.html">comparison</a>' in ask(tmp_path, "/").text


def test_damaged_tables_and_plans_are_not_served(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    for path in ("plans/two.json", "manifest.json"):
        response = ask(tmp_path, f"/runs/a/{path}")
        assert response.status_code == 200 and response.content == (tmp_path / "a" / path).read_bytes()
        assert response.headers["content-type"] == "application/json" and response.headers["etag"]
    (tmp_path / "a" / "plans" / "two.json").write_text('{"schema": 9}')
    assert ask(tmp_path, "/runs/a/plans/two.json").status_code == 422
    cut(tmp_path / "a" / "samples.parquet")
    for method in ("GET", "HEAD"):
        response = ask(tmp_path, TABLE, method=method, headers={"range": "bytes=0-3"})
        assert response.status_code == 422 and "etag" not in response.headers
    assert "not a whole Parquet file" in ask(tmp_path, TABLE).json()["error"]["message"]


def test_descriptors_are_given_back(root: Path) -> None:
    asked: list[tuple[str, str, Any]] = [
        ("GET", TABLE, {}),
        ("HEAD", TABLE, {}),
        ("GET", TABLE, {"range": "bytes=99999999-"}),
        ("GET", TABLE, {"if-match": '"x"'}),
        ("GET", TABLE, {"if-none-match": "*"}),
        ("GET", "/runs/a/../b", {}),
        ("GET", "/runs.json", {}),
        ("GET", "/runs/a/tables/cells.parquet", {}),
    ]
    ask(root, TABLE)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ask_all(root, asked)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_runs_of_a_store_are_listed_changes_are_seen_and_nothing_outside_is_reached(store: Any) -> None:
    runs = {name: (run["kind"], run["problems"]) for name, run in listed(STORE).items()}
    assert runs == {"a": ("sweep", []), "team/c": ("campaign", [])}
    for way in ("..", "%2e%2e", "%252e%252e", "..%2f..", "%2fservice-tests"):
        assert ask(STORE, f"/runs/{way}/secret/manifest.json").status_code == 404
    first = ask(STORE, "/runs/a/plans/two.json")
    store.pipe("/service-tests/runs/a/plans/two.json", first.content.replace(b'"two"', b'"ten"'))
    assert ask(STORE, "/runs/a/plans/two.json").headers["etag"] != first.headers["etag"]
    store.pipe("/service-tests/runs/a/manifest.json", b"{")
    assert listed(STORE)["a"]["state"] == "unreadable"


def test_a_file_that_is_replaced_while_it_is_sent_breaks_the_reply(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = StoreTree.open
    monkeypatch.setattr(StoreTree, "open", lambda *names: replace(open_file(*names), changed=lambda: True))
    with pytest.raises(ConnectionAbortedError):
        ask(STORE, TABLE)
