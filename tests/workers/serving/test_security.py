"""Who is answered: keys, loopback, and what the log says of it."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from reports.access import is_loopback, key_digests_of
from shortv.errors import Refused
from shortv.workers.serving.gate import log_requests
from tests.workers.serving.endpoint_fakes import (
    KEY,
    MODEL,
    PATH,
    FakeReplicas,
    body,
    get,
    image_part,
    picture,
    post,
    problem,
    uri,
)

DIGESTS = tuple(hashlib.sha256(key.encode()).hexdigest() for key in ("another-key-of-some-length", KEY))


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# team a\nanother-key-of-some-length\n\n  {KEY}  \n{KEY}\n")
    assert key_digests_of(file) == DIGESTS


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"\n# nothing\n", "has no key"),
        (b"# a\nshort-key-15-ch\n", "line 2 .* has 15 characters"),
        (b"two words are no good key\n", "line 1 .* space"),
        ("schlüssel-mit-umlauten".encode(), "line 1"),
    ],
)
def test_a_bad_key_file_is_refused_without_showing_keys(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refused, match=why) as caught:
        key_digests_of(file)
    assert "short-key" not in str(caught.value) and "words" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("key", [None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", "Bearer ä"])
def test_a_wrong_key_is_refused_and_never_named(key: str | None) -> None:
    headers = {} if key is None else {"authorization": key.encode()}
    response = get("/v1/models", headers=headers, key_digests=DIGESTS)
    error = problem(response, 401)
    assert response.headers["www-authenticate"].startswith("Bearer, Basic ")
    assert error["code"] == "invalid_api_key" and KEY not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_opens_from_anywhere(scheme: str) -> None:
    for key in ("another-key-of-some-length", KEY):
        headers = {"authorization": f"{scheme} {key}"}
        assert get("/v1/models", headers=headers, key_digests=DIGESTS, address="10.0.0.9").status_code == 200


def test_the_key_comes_before_the_path_and_the_body() -> None:
    problem(get("/v1/nothing", key_digests=DIGESTS), 401)
    problem(post(b"{", key_digests=DIGESTS), 401)
    problem(post(b"{", key_digests=DIGESTS, max_in_flight=0), 401)
    assert get("/healthz", key_digests=DIGESTS).status_code == 200


@pytest.mark.parametrize(
    ("address", "host", "headers", "status"),
    [
        ("127.0.0.1", "localhost", {}, 200),
        ("127.9.9.9", "127.0.0.1:8000", {}, 200),
        ("::1", "[::1]:8000", {}, 200),
        ("::ffff:127.0.0.1", "localhost:8000", {}, 200),
        ("10.0.0.9", "localhost", {}, 403),
        ("::ffff:10.0.0.9", "localhost", {}, 403),
        ("unix", "localhost", {}, 403),
        # A page that points its own name at this machine.
        ("127.0.0.1", "evil.example", {}, 403),
        ("127.0.0.1", "127.0.0.1.evil.example", {}, 403),
        # A proxy that speaks for somebody.
        ("127.0.0.1", "localhost", {"x-forwarded-for": "127.0.0.1"}, 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(address: str, host: str, headers: Any, status: int) -> None:
    response = get("/v1/models", address=address, headers={"host": host, **headers})
    assert response.status_code == status
    if status == 403:
        assert "--api-key-file" in problem(response, 403)["message"]


def test_loopback_is_an_address_not_a_name() -> None:
    assert not is_loopback("localhost") and not is_loopback("")


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 64])
def test_a_callers_id_is_kept(given: str) -> None:
    assert get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["x" * 65, "a b", "a;b", "é", ""])
def test_a_strange_id_is_replaced(given: str) -> None:
    found = get("/v1/models", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert found != given and len(found) == 32


def test_behind_serve_the_id_is_added_once() -> None:
    assert "x-request-id" not in get("/v1/models", sends_request_id=False).headers


def test_a_line_per_request_is_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("shortv.endpoint")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    log_requests()
    log_requests()
    get("/v1/none%0A2026-01-01?a=b", headers={"x-request-id": "mine"})
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"[-0-9]+ [:,0-9]+ INFO mine GET /v1/none%0A2026-01-01 status=404 model=- received=0 sent=\d+ ms=[.0-9]+", line
    )


def test_the_log_holds_sizes_and_ids_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "Hildegard"
    post({"model": MODEL, "messages": [{"role": "user", "content": secret}]})
    post({"model": secret, "messages": [{"role": "user", "content": secret}]})
    post({"model": MODEL, "messages": [{"role": secret, "content": secret}], "seed": secret})
    post(body(image_part(uri(picture())), stop=[secret]), FakeReplicas(error=ValueError(secret)))
    post(f'{{"{secret}": '.encode())
    get("/v1/models", headers={"authorization": f"Bearer {secret}"}, key_digests=DIGESTS)
    lines = [record for record in caplog.records if record.name == "shortv.endpoint"]
    assert [record.getMessage().split()[1:4] for record in lines if record.levelno == logging.INFO] == [
        *(["POST", PATH, f"status={status}"] for status in (200, 404, 400, 500, 400)),
        ["GET", "/v1/models", "status=401"],
    ]
    assert f"model={MODEL} received=" in lines[0].getMessage() and "model=- " in lines[1].getMessage()
    # httpx2 and asyncio log too, and neither may know.
    assert secret not in caplog.text and "The cat" not in caplog.text
    assert "ValueError" in caplog.text and "endpoint_fakes.py" in caplog.text
