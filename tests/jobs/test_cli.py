"""The installed command runs the jobs."""

from __future__ import annotations

import sys

import click
import pytest

from jobs.cli import COMMANDS, main, shortv


@pytest.mark.parametrize("name", [*COMMANDS, "lc-sweep"])
def test_every_job_is_a_subcommand(name: str) -> None:
    with click.Context(shortv) as context:
        assert isinstance(shortv.get_command(context, name), click.Command)


def test_a_refusal_has_the_status_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shortv", "bench", "prefill", "--shape", "llava-2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
