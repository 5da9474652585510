"""Foreign text cannot forge lines, send escapes or use markup."""

import io

import pytest
from rich.console import Console

from shortv.terminal import printable, say


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nError: forged", "a\rb", "\u202eabc", "\ud800", "\x9b0m"])
def test_control_characters_become_escapes(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and "\\" in shown


def test_ordinary_text_stays_and_long_text_is_cut() -> None:
    assert printable("Größe 模型 [/b] 5 %") == "Größe 模型 [/b] 5 %"
    assert len(printable("x" * 10**7)) <= 2000


@pytest.mark.parametrize("text", ["[/x]", "o[/b]", "[red]", "a[link=x]b", ":smile:"])
def test_markup_in_names_is_printed_as_it_is(text: str) -> None:
    sink = io.StringIO()
    say(Console(file=sink, width=80), text)
    assert sink.getvalue() == text + "\n"
