"""SIGTERM and Ctrl-C as errors of one line: `ray job stop` must leave a folder that continues."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shortv.errors import ShortVError


class Stopped(ShortVError, SystemExit):
    """The user, or the cluster, ended the run; the same command continues it.

    It is a SystemExit as well: asyncio logs and drops other errors that are raised in a callback of its loop, and click
    replaces KeyboardInterrupt.
    """

    def __init__(self, number: int) -> None:
        super().__init__("stopped before the end; what is finished is kept, and the same command continues")
        self.exit_status = self.code = 128 + number


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Raise Stopped in the block when SIGTERM or SIGINT comes; the old handlers return afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
