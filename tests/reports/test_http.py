"""The guard before every HTTP application, and the server that runs it."""

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router

from reports import http
from reports.access import bound
from reports.http import Guard, HttpError, Limits, guarded

KEY = b"a-key-of-24-characters-x"
DIGESTS = (hashlib.sha256(KEY).hexdigest(),)


async def echo(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body()) if request.method == "POST" else 0})


async def broken_stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise HttpError(504, "too late", code="deadline")

    return StreamingResponse(chunks(), media_type=request.query_params["type"])


APP = Router([Route("/echo", echo, methods=["POST", "GET"]), Route("/stream", broken_stream)])


def scope(method: str = "POST", path: str = "/echo", query: bytes = b"", headers: Sequence[Any] = ()) -> Any:
    own = [(b"host", b"localhost"), *headers]
    about = {"type": "http", "method": method, "path": path, "query_string": query, "headers": own}
    return {**about, "client": ("127.0.0.1", 1), "root_path": "", "scheme": "http", "server": ("localhost", 80)}


class Client:
    """One request to a guard: messages are received when the test sends them."""

    def __init__(self, guard: Guard, about: Any) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.task = asyncio.create_task(guard(about, self.messages.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def body(self, chunk: bytes, more: bool = False) -> None:
        self.messages.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    async def reply(self) -> tuple[int, Any]:
        await asyncio.wait_for(self.task, 60)
        return self.sent[0]["status"], json.loads(b"".join(item.get("body", b"") for item in self.sent[1:]))


def test_long_headers_are_refused_before_the_key_is_read() -> None:
    async def run(**about: Any) -> int:
        return (await Client(Guard(APP, key_digests=DIGESTS), scope(method="GET", **about)).reply())[0]

    accepted = (b"authorization", b"Bearer " + KEY)
    assert asyncio.run(run(headers=[(b"x-long", b"x" * 2**20)])) == 431
    assert asyncio.run(run(query=b"x" * 2**20)) == 431
    assert asyncio.run(run(headers=[(b"x-short", b"x" * 2**10), accepted])) == 200


WRONG = (b"", KEY, b"Bearer ", b"Bearer " + KEY + b"x", b"Basic " + KEY, b"Basic !!!", b"Digest " + KEY)


@pytest.mark.parametrize("given", [*WRONG, b"Basic " + base64.b64encode(KEY + b":")])
def test_a_wrong_key_is_refused_and_never_shown(given: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def run() -> list[Any]:
        client = Client(Guard(APP, key_digests=DIGESTS), scope(headers=[(b"authorization", given)]))
        assert (await client.reply())[0] == 401
        return client.sent

    start, body = asyncio.run(run())
    challenges = [value for name, value in start["headers"] if name == b"www-authenticate"]
    assert challenges[0] == b"Bearer" and challenges[1].startswith(b"Basic realm=")
    assert KEY not in body["body"] and KEY.decode() not in caplog.text


@pytest.mark.parametrize(
    ("address", "headers", "status"),
    [
        ("10.0.0.9", [(b"authorization", b"bearer " + KEY)], 200),
        ("10.0.0.9", [(b"authorization", b"Basic " + base64.b64encode(b"me:" + KEY))], 200),
        ("127.0.0.1", [], 200),
        ("::1", [(b"host", b"[::1]:8000")], 200),
        ("10.0.0.9", [], 403),
        ("127.0.0.1", [(b"host", b"evil.example")], 403),
        ("127.0.0.1", [(b"x-forwarded-for", b"127.0.0.1")], 403),
    ],
)
def test_keys_open_from_anywhere_and_without_keys_only_this_machine_is_answered(
    address: str, headers: Any, status: int
) -> None:
    async def run() -> int:
        keys = DIGESTS if headers and headers[0][0] == b"authorization" else ()
        about = scope(method="GET", headers=headers) | {"client": (address, 1)}
        return (await Client(Guard(APP, key_digests=keys), about).reply())[0]

    assert asyncio.run(run()) == status


def test_browsers_get_errors_as_pages_without_scripts() -> None:
    async def fail(request: Request) -> Response:
        raise HttpError(404, "<script>alert(1)</script>" * 2**16, code="not_found")

    async def run() -> list[Any]:
        guard = Guard(Router([Route("/echo", fail, methods=["GET"])]))
        client = Client(guard, scope(method="GET", headers=[(b"accept", b"text/html,*/*")]))
        await client.task
        return client.sent

    start, body = asyncio.run(run())
    assert start["status"] == 404 and b"&lt;script&gt;" in body["body"] and b"<script" not in body["body"]
    assert len(body["body"]) < 2**12
    assert {b"content-security-policy", b"x-frame-options", b"x-request-id"} <= {name for name, _ in start["headers"]}


def test_bodies_are_bounded_one_by_one_and_together() -> None:
    limits = Limits(max_body_bytes=100, max_bytes_in_flight=150, receive_timeout_s=60)

    async def run() -> None:
        guard = Guard(APP, limits=limits)
        declared, lying, first, second = (
            Client(guard, scope(headers=[(b"content-length", b"1" * 30)])),
            Client(guard, scope(headers=[(b"content-length", b"1")])),
            Client(guard, scope()),
            Client(guard, scope()),
        )
        lying.body(b"x" * 101)
        assert (await declared.reply())[0] == (await lying.reply())[0] == 413
        first.body(b"x" * 90, more=True)
        while not first.messages.empty():
            await asyncio.sleep(0)
        second.body(b"x" * 90)
        status, error = await second.reply()
        assert status == 429 and error["error"]["code"] == "overloaded"
        first.body(b"x" * 10)
        assert await first.reply() == (200, {"bytes": 100})
        # The bytes of requests that have ended count no more.
        third = Client(guard, scope())
        third.body(b"x" * 100)
        assert (await third.reply())[0] == 200

    asyncio.run(run())


def test_half_sent_bodies_take_no_slot_and_end() -> None:
    async def run() -> None:
        guard = Guard(APP, limits=Limits(max_in_flight=1, receive_timeout_s=0.2))
        slow = [Client(guard, scope()) for _ in range(5)]
        for client in slow:
            client.body(b"x", more=True)
        await asyncio.sleep(0)
        good = Client(guard, scope())
        good.body(b"xx")
        assert await good.reply() == (200, {"bytes": 2})
        assert [(await client.reply())[0] for client in slow] == [408] * 5

    asyncio.run(run())


def test_more_requests_than_slots_are_refused() -> None:
    released = asyncio.Event()

    async def wait(request: Request) -> Response:
        await released.wait()
        return JSONResponse({})

    async def run() -> None:
        guard = Guard(Router([Route("/echo", wait, methods=["POST"])]), limits=Limits(max_in_flight=1))
        clients = [Client(guard, scope()) for _ in range(2)]
        for client in clients:
            client.body(b"x")
        status, error = await clients[1].reply()
        assert status == 429 and (b"retry-after", b"1") in clients[1].sent[0]["headers"], error
        released.set()
        assert (await clients[0].reply())[0] == 200

    asyncio.run(run())


def test_an_error_ends_a_stream_of_events_and_breaks_any_other() -> None:
    async def run(kind: str) -> Client:
        client = Client(Guard(APP), scope("GET", "/stream", query=b"type=" + kind.encode()))
        await asyncio.wait([client.task], timeout=60)
        return client

    events = asyncio.run(run("text/event-stream"))
    assert events.task.exception() is None and json.loads(events.sent[-1]["body"][6:])["error"]["code"] == "deadline"
    assert isinstance(asyncio.run(run("application/octet-stream")).task.exception(), ConnectionAbortedError)


def test_the_server_bounds_headers_and_its_replies_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[uvicorn.Server] = []
    up = threading.Event()
    initialise = http._Server.__init__
    monkeypatch.setattr(http._Server, "__init__", lambda *args: servers.append(args[0]) or initialise(*args))
    with bound("127.0.0.1", 0) as listening:
        serve = partial(http.serve_app, guarded(APP.routes), listening, announce=up.set)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert up.wait(60)
        with socket.create_connection(listening.getsockname(), timeout=60) as client:
            client.sendall(b"GET /echo HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            # Otherwise a short reply waits 40 ms for an acknowledgement.
            (connection,) = servers[0].server_state.connections
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with socket.create_connection(listening.getsockname(), timeout=60) as client:
            client.sendall(b"GET /echo HTTP/1.1\r\nhost: localhost\r\nx: ")
            with contextlib.suppress(OSError):  # the server closes before all of it is sent
                for _ in range(400):
                    client.sendall(b"x" * 2**10)
            assert client.recv(100).startswith(b"HTTP/1.1 400")
        servers[0].should_exit = True
        thread.join(60)
