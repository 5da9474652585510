"""An OpenAI-compatible judge on loopback that fails now and then."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret"
Says = int | str | tuple[int, dict[str, str]]


class FlakyJudge(ThreadingHTTPServer):
    """Echoes the question, except for calls that `script` says something else for; `asked` holds all calls."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[Says] = []
        self.asked: list[Any] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyJudge

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(asked)
        says = self.server.script.pop(0) if self.server.script else 200
        if says == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
            return
        status, headers = says if isinstance(says, tuple) else (says, {}) if isinstance(says, int) else (200, {})
        body = says if isinstance(says, str) else json.dumps(_reply(asked) if status == 200 else {"error": KEY})
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), "content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def _reply(asked: Any) -> Any:
    message = {"role": "assistant", "content": asked["messages"][-1]["content"]}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice]}


@contextmanager
def flaky_judge() -> Iterator[FlakyJudge]:
    """Serve until the block ends."""
    with FlakyJudge() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield found
        finally:
            found.closing.set()
            found.shutdown()
            thread.join(60)
