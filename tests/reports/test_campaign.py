"""The manifest of a campaign: strict on the way in, free of secrets on the way out, never taken for a sweep's."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from reports.campaign import CampaignManifest
from reports.manifest import Manifest, State, utc_now
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.errors import Refused
from tests.reports.test_manifest import manifest as sweep_manifest


def manifest(**changes: Any) -> CampaignManifest:
    values: dict[str, Any] = {
        "state": State.RUNNING,
        "arguments": {"models": ["m"], "limit": 10.0, "gen_kwargs": {"hf_token": "hunter2"}},
        "versions": {"python": "3.11"},
        "models": ({"name": "m"},),
        "plans": ({"model": "m", "name": "full", "modes": ["full", "full"]},),
        "tasks": ({"name": "shapes"},),
        "seed": 0,
        "started": utc_now(),
    }
    return CampaignManifest(**(values | changes))


def test_it_comes_back_as_saved(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    final = manifest(state=State.PARTIAL, counts={"cells": 2, "failed": 1}, finished=utc_now(), wall_seconds=3.5)
    for one in (manifest(), final):
        one.save(folder)
        assert CampaignManifest.load(folder) == one
    assert "hunter2" not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sweep"}, "kind 'sweep', not 'campaign'; give the output folder of jobs/campaign.py"),
        ({"schema_version": 2}, "schema version 2.*run the campaign in a new folder"),
        ({"state": "finished"}, "unknown state 'finished'"),
        ({"seed": True}, "seed of the wrong type"),
        ({"models": {}}, "models of the wrong type"),
        ({"surprise": 1}, "unknown fields \\['surprise'\\]"),
    ],
)
def test_strange_manifests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        CampaignManifest.from_json(manifest().to_json() | change)


def test_every_field_has_a_type_check() -> None:
    for name in {field.name for field in dataclasses.fields(CampaignManifest)} - {"schema_version", "kind"}:
        with pytest.raises(Refused):
            CampaignManifest.from_json(manifest().to_json() | {name: object()})


def test_sweeps_and_campaigns_are_told_apart(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with pytest.raises(Refused, match=r"holds no manifest.json; give an output folder of jobs/campaign.py"):
        CampaignManifest.load(folder)
    manifest().save(folder)
    with pytest.raises(Refused, match="kind 'campaign', not 'sweep'"):
        Manifest.load(folder)
    sweep_manifest().save(folder)
    with pytest.raises(Refused, match="kind 'sweep', not 'campaign'"):
        CampaignManifest.load(folder)


def test_scores_come_back_from_a_part(tmp_path: Path) -> None:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["answers"].names)
    row |= {"cell": "k", "sample_id": "s", "model": "m", "plan": "full", "task": "t"}
    row["scores"] = [{"metric": "exact_match", "value": 1.0}, {"metric": "other", "value": None}]
    folder = Folder(tmp_path)
    folder.write_table("answers/k", [row, row | {"sample_id": "failed", "scores": [], "error": "truncated"}])
    assert folder.read_table("answers/k").to_pylist()[0] == row
    assert folder.read_tables("answers").num_rows == 2
    with pytest.raises(ValueError, match="'scores' of table 'answers/k' holds a null"):
        folder.write_table("answers/k", [row | {"scores": None}])
    with pytest.raises(pa.ArrowException):
        folder.write_table("answers/k", [row | {"latency_ms": "fast"}])
