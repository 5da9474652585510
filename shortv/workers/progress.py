"""A progress bar with samples per second; without a terminal, a line every few seconds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shortv.terminal import printable

SECONDS_BETWEEN_LINES = 15.0


class SampleProgress:
    """Counts samples as they get done; in a sweep, one with half of its layers measured counts as half."""

    def __init__(
        self,
        *,
        total: int,
        done: float = 0.0,
        console: Console,
        label: str = "sweep",
        brief: bool = False,
    ) -> None:
        """Start at `done` of `total` samples, those of an earlier run of the same command.

        Where there is no terminal, `brief` leaves out the lines at the start and at the end.
        """
        self._console, self._brief = console, brief
        self._total, self._before, self._done = total, done, done
        self._started = self._last_line = time.monotonic()
        self._errors, self._note = 0, ""
        name = TextColumn("{task.fields[label]}", markup=False)
        columns = (name, BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(self._text(), total=total, completed=int(done), label=printable(label))

    def __enter__(self) -> SampleProgress:
        if not self._bar.disable:
            self._bar.start()
        elif not self._brief:
            self._print()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()
        elif self._done > self._before and not self._brief:
            self._print()

    def advance(self, samples: float, errors: int) -> None:
        """Note a finished unit: its samples times its share of the layers, and its error rows."""
        self._done += samples
        self._errors += errors
        self._bar.update(self._task, completed=self._done, description=self._text())
        if self._bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print()

    def note(self, text: str) -> None:
        """Show a word on how the run goes, such as its loss, from the next line on."""
        self._note = text

    def _print(self) -> None:
        self._console.print(self._text(), highlight=False)

    def _text(self) -> str:
        seconds = time.monotonic() - self._started
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        text = f"{round(self._done, 1):g}/{self._total} samples, {rate:.2f} samples/s"
        text = f"{text}, {self._note}" if self._note else text
        return f"{text}, {self._errors} errors" if self._errors else text
