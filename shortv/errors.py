"""The errors that this project raises for its users."""

import re

from shortv.terminal import printable


class ShortVError(Exception):
    """Work that started could not be finished; the message is one line for the user."""

    exit_status = 1


class Refused(ShortVError):
    """A request is turned down before any work starts, because its input cannot be right."""

    exit_status = 2


class SampleError(ShortVError):
    """One sample cannot be used, while the samples beside it can.

    `stage` says where it failed (for example "encode"), `error` is a short kind that can be counted
    (for example "ImageUnreadable"), and the message tells the user what was found.
    """

    def __init__(self, stage: str, error: str, message: str) -> None:
        # All three go to args: an exception is rebuilt from them when it crosses a process boundary.
        super().__init__(stage, error, message)
        self.stage = stage
        self.error = error
        self.message = message

    def __str__(self) -> str:
        return self.message


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """Return an error's message as one printable line, or its type where it has no message."""
    # With a memory address, the same failure would read differently in every run.
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the bytes", str(error)[: 4 * limit])
    return printable(" ".join(text.split()) or type(error).__name__, limit=limit)
