"""Text on the user's terminal. Text from outside (names in files, messages of other programs) passes `printable`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: object, *, limit: int = 2000) -> str:
    """Return the text in one line without control characters, shortened to `limit` characters.

    Line breaks, terminal escapes, invisible direction marks and lone surrogates become escapes such as `\\x1b`: they
    could otherwise forge lines of output or change the terminal's state.
    """
    # At most `limit` characters are looked at; escapes only make the text longer.
    found = str(text)[: limit + 1]
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in found)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def console() -> Console:
    """Return the terminal, or for a log file a page wide enough for tables."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=120)


def say(target: Console, text: object) -> None:
    """Print one line that may hold text from outside: no markup, no highlighting, no control characters."""
    target.print(printable(text), markup=False, highlight=False, emoji=False, soft_wrap=True)
