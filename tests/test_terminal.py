"""Foreign text cannot forge lines, send escapes or use markup."""

import io

import pytest
from rich.console import Console

from shortv.terminal import printable, say
from shortv.workers.progress import SampleProgress


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


def test_the_label_of_a_progress_bar_is_printed_as_it_is() -> None:
    sink = io.StringIO()
    with SampleProgress(total=1, console=Console(file=sink, width=80, force_terminal=True), label="a[/x]{b}\x1b[31m"):
        pass
    assert r"a[/x]{b}\x1b[31m" in sink.getvalue()
