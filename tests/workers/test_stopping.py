"""A signal stops the run wherever it arrives."""

from __future__ import annotations

import asyncio
import gc
import signal

import pytest

from shortv.workers.run import Stopped, run_async, stop_on_signal


def test_what_compiled_code_makes_of_a_signal_is_still_a_stop() -> None:
    with pytest.raises(Stopped), stop_on_signal():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped as stop:
            raise SystemError("<built-in function get> returned a result with an exception set") from stop
    with pytest.raises(SystemError), stop_on_signal():
        raise SystemError("not a signal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_what_runs_in_an_event_loop_and_leaves_it_as_one_error(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before, ended = signal.getsignal(number), []

    async def wait(name: int) -> None:
        try:
            if name == 3:  # from inside a step of the loop
                signal.raise_signal(number)
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def work() -> None:
        await asyncio.gather(*map(wait, range(4)))

    with pytest.raises(Stopped) as stopped, stop_on_signal():
        run_async(work())
    assert stopped.value.exit_status == 128 + number
    assert sorted(ended) == [0, 1, 2, 3] and signal.getsignal(number) is before
    gc.collect()  # asyncio complains of an error that nobody reads when its task goes
    assert not caplog.records
