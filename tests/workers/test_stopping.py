"""A signal stops the run wherever it arrives."""

from __future__ import annotations

import asyncio
import signal

import pytest

from shortv.workers.run import Stopped, stop_on_signal


def test_a_signal_in_a_callback_of_the_event_loop_stops_the_run() -> None:
    async def serve() -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        for _ in range(3):
            await asyncio.sleep(0)

    with pytest.raises(Stopped) as stopped, stop_on_signal():
        asyncio.run(serve())
    assert stopped.value.exit_status == 128 + signal.SIGTERM


def test_what_compiled_code_makes_of_a_signal_is_still_a_stop() -> None:
    with pytest.raises(Stopped), stop_on_signal():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped as stop:
            raise SystemError("<built-in function get> returned a result with an exception set") from stop
    with pytest.raises(SystemError), stop_on_signal():
        raise SystemError("not a signal")
