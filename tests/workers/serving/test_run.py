"""How an endpoint begins and ends, without Ray."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shortv.families import load_architecture
from shortv.plan import Plan
from shortv.workers.serving import run
from shortv.workers.serving.spec import EndpointSpec
from tests.tiny_model import TINY

MODEL = str(TINY / "model")


@pytest.mark.parametrize("status", ["gone", "DELETING"])
def test_the_end_does_not_wait_for_a_replica_that_never_ends(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = []
    monkeypatch.setattr(run.serve, "delete", lambda name, _blocking: deleted.append((name, _blocking)))
    monkeypatch.setattr(run, "_status", lambda: status)
    monkeypatch.setattr(run, "_DELETION_S", 0.3)
    run._end(alone=False)
    assert deleted == [(run.APP, False)]


def test_a_plan_made_for_this_very_folder_is_nothing_to_warn_of(tmp_path: Path) -> None:
    found = load_architecture(MODEL)
    plan = Plan.full(num_layers=found.num_layers, name="p", model=MODEL, config_digest=found.config_digest)
    said = io.StringIO()

    def check(plan: Plan) -> str:
        file = plan.save(tmp_path / "p.json")
        run.check_model(EndpointSpec(model=MODEL, plans=(str(file),)), Console(file=said))
        return said.getvalue()

    assert check(plan) == ""
    assert "made for revision abc" in check(replace(plan, revision="abc"))
