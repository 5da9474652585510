"""An endpoint in a process of its own, for as long as it is measured."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shortv.errors import ShortVError

_READY_S, _STOP_S = 180.0, 60.0


@contextmanager
def running_endpoint(job: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Run jobs/serve.py on a free port of loopback; gives its URL. Raises ShortVError when it does not come up."""
    port = _free_port()
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(job), "--port", str(port), *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            _wait(process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[str], log: object) -> None:
    until = time.monotonic() + _READY_S
    while True:
        log.seek(0)  # type: ignore[attr-defined]  # a temporary file has no public type
        text = str(log.read())  # type: ignore[attr-defined]
        if "is ready" in text:
            return
        if process.poll() is not None or time.monotonic() > until:
            raise ShortVError(f"the endpoint did not come up: {(text.strip().splitlines() or ['no output'])[-1]}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
