"""The installed command runs the jobs."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from jobs.cli import JOBS, main, shortv


@pytest.mark.parametrize("name", [*JOBS, "lc-sweep"])
def test_every_job_is_a_subcommand(name: str) -> None:
    assert CliRunner().invoke(shortv, [name, "--help"]).exit_code == 0


def test_a_refusal_has_the_status_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shortv", "bench", "prefill", "--shape", "llava-2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
