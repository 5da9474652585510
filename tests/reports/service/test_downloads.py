"""Tables and plans as downloads: whole, in ranges, and only once."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet as pq

from reports.schemas import SCHEMAS
from tests.reports.runs import make_sweep
from tests.reports.service.asking import ask, ask_all, listed
from tests.reports.service.folders import make_campaign

TABLE = "/runs/a/tables/samples.parquet"


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    make_sweep(tmp_path / "a")
    return tmp_path


def test_a_table_comes_whole(root: Path) -> None:
    data = (root / "a" / "samples.parquet").read_bytes()
    response = ask(root, TABLE)
    assert response.status_code == 200 and response.content == data
    assert response.headers["content-length"] == str(len(data))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"].startswith('attachment; filename="a-samples.parquet"')
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert pq.read_table(io.BytesIO(response.content)).schema.equals(SCHEMAS["samples"])


def test_head_says_the_same_without_the_file(root: Path) -> None:
    get, head = ask_all(root, [("GET", TABLE, {}), ("HEAD", TABLE, {"range": "bytes=0-3"})])
    assert head.status_code == 200 and not head.content
    own = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in get.headers.items() if k not in own
    }


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=4-9", 4, 10),
        ("bytes=10-", 10, None),
        ("bytes=-8", -8, None),
        ("bytes=5-99999999", 5, None),
        ("bytes=-99999999", 0, None),
        ("Bytes = 2 - 3", 2, 4),
    ],
)
def test_a_range_comes_alone(root: Path, asked: str, start: int, stop: int | None) -> None:
    data = (root / "a" / "samples.parquet").read_bytes()
    response = ask(root, TABLE, headers={"range": asked})
    places = range(len(data))[start:stop]
    assert response.status_code == 206 and response.content == data[start:stop]
    assert response.headers["content-range"] == f"bytes {places[0]}-{places[-1]}/{len(data)}"
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["etag"] == ask(root, TABLE).headers["etag"]


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=99999999-999999999"])
def test_a_range_beyond_the_end_is_refused(root: Path, asked: str) -> None:
    response = ask(root, TABLE, headers={"range": asked})
    size = (root / "a" / "samples.parquet").stat().st_size
    assert response.status_code == 416 and response.headers["content-range"] == f"bytes */{size}"
    assert response.json()["error"]["code"] == "no_such_range"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,3-4", "lines=0-1", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "0-1", "bytes=" + "9" * 5000 + "-"],
)
def test_other_ranges_are_ignored(root: Path, asked: str) -> None:
    response = ask(root, TABLE, headers={"range": asked})
    assert response.status_code == 200 and response.content == (root / "a" / "samples.parquet").read_bytes()


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
        ({"if-range": '"x"', "range": "bytes=0-3"}, 200),
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


def test_no_byte_is_read_before_the_first_is_sent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of any size: only its footer is read, and the entity tag changes with the file."""
    path = root / "a" / "samples.parquet"
    first = ask(root, TABLE).headers["etag"]
    os.utime(path, (1e9, 1e9))
    second = ask(root, TABLE).headers["etag"]
    assert first != second == ask(root, TABLE).headers["etag"]
    sparse = root / "a" / "lc_layers.parquet"
    data = sparse.read_bytes()
    with sparse.open("wb") as file:
        # A terabyte of nothing before a footer that is whole.
        file.write(b"PAR1")
        file.seek(2**40)
        file.write(data[4:])
    response = ask(root, "/runs/a/tables/lc_layers.parquet", headers={"range": "bytes=0-3"})
    assert response.status_code == 206 and response.content == b"PAR1"


def test_parts_of_a_table_are_listed_and_come_one_by_one(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a", rows_per_part=10)
    found = ask(tmp_path, "/runs/a/tables/lc_samples").json()["files"]
    assert [item["path"] for item in found] == [f"tables/lc_samples/part-0000{part}.parquet" for part in range(3)]
    assert [item["rows"] for item in found] == [10, 10, 10]
    for item in found:
        data = (tmp_path / "a" / item["path"].removeprefix("tables/")).read_bytes()
        assert ask(tmp_path, f"/runs/a/{item['path']}").content == data
        # The page links to the files where they lie.
        assert ask(tmp_path, f"/runs/a/{item['path'].removeprefix('tables/')}").content == data
    whole = ask(tmp_path, "/runs/a/tables/lc_samples.parquet")
    assert whole.status_code == 404
    assert "lc_samples has 3 parts; GET /runs/a/tables/lc_samples lists them" in whole.json()["error"]["message"]
    assert len(ask(tmp_path, "/runs/a/tables").json()["files"]) == 6


def test_the_only_part_of_a_table_is_the_table(root: Path) -> None:
    part = root / "a" / "lc_samples" / "part-00000.parquet"
    for path in ("tables/lc_samples.parquet", "lc_samples.parquet"):
        response = ask(root, f"/runs/a/{path}")
        assert response.status_code == 200 and response.content == part.read_bytes()
        assert "a-lc_samples-part-00000.parquet" in response.headers["content-disposition"]
    assert ask(root, "/runs/a/tables/answers.parquet").status_code == 404
    part.write_bytes(b"PAR1")
    assert ask(root, "/runs/a/tables/lc_samples.parquet").status_code == 422


@pytest.mark.parametrize("state", ["running", "partial", "complete"])
def test_downloads_and_their_list_say_the_state(tmp_path: Path, state: str) -> None:
    make_sweep(tmp_path / "a", state=state)
    for path in ("tables/samples.parquet", "tables/lc_samples/part-00000.parquet", "plans/two.json", "manifest.json"):
        for method, headers in (("GET", {}), ("HEAD", {}), ("GET", {"range": "bytes=0-3"}), ("GET", {"if-match": "*"})):
            assert ask(tmp_path, f"/runs/a/{path}", method=method, headers=headers).headers["x-run-state"] == state
    assert ask(tmp_path, "/runs/a/tables").json()["state"] == state
    assert ask(tmp_path, "/runs/a/tables/lc_samples").json()["state"] == state


def test_a_comparison_is_served_where_there_is_one(root: Path) -> None:
    missing = ask(root, "/runs/a/report-against.html")
    assert missing.status_code == 404 and "FOLDER/a --against OTHER" in missing.json()["error"]["message"]
    assert "comparison" not in ask(root, "/").text and listed(root)["a"]["page_against"] is None
    (root / "a" / "report-against.html").write_bytes(b"<html><body>moved</body></html>")
    response = ask(root, "/runs/a/report-against.html")
    assert (
        response.text == "<html><body>moved</body></html>" and "sandbox" in response.headers["content-security-policy"]
    )
    assert listed(root)["a"]["page_against"] == "runs/a/report-against.html"
    assert '<a href="runs/a/report-against.html">comparison</a>' in ask(root, "/").text


def test_every_table_of_a_campaign_can_be_had(tmp_path: Path) -> None:
    make_campaign(tmp_path / "c", failed=1)
    found = ask(tmp_path, "/runs/c/tables").json()["files"]
    assert {item["table"] for item in found} == {"cells", "metrics", "comparisons", "speed", "answers"}
    for item in found:
        assert pq.read_table(io.BytesIO(ask(tmp_path, f"/runs/c/{item['path']}").content)).num_rows == item["rows"]


def test_a_damaged_table_is_not_handed_out(root: Path) -> None:
    path = root / "a" / "samples.parquet"
    for data in (path.read_bytes()[:-9], b"PAR1", b"", b"not parquet at all" * 10):
        path.write_bytes(data)
        for method in ("GET", "HEAD"):
            response = ask(root, TABLE, method=method, headers={"range": "bytes=0-3"})
            assert response.status_code == 422 and "etag" not in response.headers
        assert "not a whole Parquet file" in ask(root, TABLE).json()["error"]["message"]
    (item,) = [item for item in ask(root, "/runs/a/tables").json()["files"] if item["table"] == "samples"]
    assert "not a whole Parquet file" in item["problem"] and item["rows"] is None


def test_a_plan_and_the_manifest_come_as_json(root: Path) -> None:
    for path in ("plans/two.json", "manifest.json"):
        response = ask(root, f"/runs/a/{path}")
        assert response.status_code == 200 and response.content == (root / "a" / path).read_bytes()
        assert response.headers["content-type"] == "application/json" and response.headers["etag"]
    (root / "a" / "plans" / "two.json").write_text('{"schema": 9}')
    assert ask(root, "/runs/a/plans/two.json").status_code == 422


def test_other_methods_are_refused(root: Path) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        response = ask(root, TABLE, method=method)
        assert response.status_code == 405 and response.headers["allow"]


def test_descriptors_are_given_back(root: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    ask(root, TABLE)
    before = count()
    asked: list[tuple[str, str, Any]] = [
        ("GET", TABLE, {}),
        ("HEAD", TABLE, {}),
        ("GET", TABLE, {"range": "bytes=99999999-"}),
        ("GET", TABLE, {"if-match": '"x"'}),
        ("GET", TABLE, {"if-none-match": "*"}),
        ("GET", "/runs/a/../b", {}),
        ("GET", "/runs.json", {}),
        ("GET", "/runs/a/tables", {}),
        ("GET", "/runs/a/tables/cells.parquet", {}),
    ]
    for _ in range(5):
        ask_all(root, asked)
    assert count() <= before + 1
