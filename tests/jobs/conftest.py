"""Jobs run in this process, as their scripts do it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from jobs.common import run

Job = Callable[..., tuple[int, str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Run a job; gives its exit status and what it said: on stdout, or on stderr when it failed."""

    def start(command: Any, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["job.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(command)
        said = capsys.readouterr()
        status = int(ended.value.code or 0)
        # The Ray of these tests, unlike that of a job, says on stderr what Serve does.
        return status, said.err if status else said.out

    return start


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a port of loopback that nothing listens on."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return int(probe.getsockname()[1])

    return find
