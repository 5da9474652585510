"""Starting Ray on this machine."""

from __future__ import annotations

import os
import sys

import click
import pytest
import ray

from jobs.common import run
from shortv.workers import cluster


@pytest.mark.parametrize("verbose", [False, True])
def test_what_ray_writes_while_it_starts_is_shown_on_request(
    verbose: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def job() -> None:
        cluster.start()

    monkeypatch.setenv("SHORTV_VERBOSE", "")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    monkeypatch.setattr(ray, "init", lambda **_: os.write(2, b"from Ray"))
    monkeypatch.setattr(sys, "argv", ["job", *["--verbose"] * verbose])
    with pytest.raises(SystemExit) as ended:
        run(job)
    assert not ended.value.code
    assert ("from Ray" in capfd.readouterr().err) == verbose
    os.write(2, b"afterwards")
    assert "afterwards" in capfd.readouterr().err
