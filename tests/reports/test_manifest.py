"""The manifest: strict on the way in, free of secrets on the way out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.manifest import Manifest, State, arguments_digest, utc_now, versions
from reports.masking import masked
from reports.store import Folder
from shortv.errors import Refused


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "state": State.RUNNING,
        "arguments": {"model": "m", "layers": [0, 1], "hf_token": "hidden"},
        "arguments_digest": "aa",
        "versions": {"python": "3.11"},
        "model": "m",
        "revision": None,
        "config_digest": "bb",
        "num_layers": 2,
        "modes": ("freeze-visual",),
        "kl_direction": "full-ablated",
        "calibration_ids": ("s0", "s1"),
        "calibration_digest": "cc",
        "seed": 0,
        "started": utc_now(),
    }
    return Manifest(**(values | changes))


def test_it_comes_back_as_saved(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    final = manifest(
        state=State.PARTIAL,
        counts={"used": 1, "errors": 1},
        noise_floor=1e-7,
        wall_seconds=3,
        stability={"freeze-visual": {"0.5": 1.0}},
        details={"device": "cpu"},
    )
    for one in (manifest(), final):
        one.save(folder)
        assert Manifest.load(folder) == one
    text = (tmp_path / "manifest.json").read_text()
    assert "hidden" not in text and text.startswith('{\n  "schema_version": 1')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "campaign"}, "kind 'campaign', not 'sweep'"),
        ({"schema_version": 2}, "schema version 2"),
        ({"state": "finished"}, "unknown state 'finished'"),
        ({"seed": "0"}, "seed of the wrong type"),
        ({"seed": True}, "seed of the wrong type"),
        ({"surprise": 1}, "unknown fields \\['surprise'\\]"),
    ],
)
def test_strange_manifests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Manifest.from_json(manifest().to_json() | change)


def test_missing_fields_and_missing_manifests_are_refused(tmp_path: Path) -> None:
    value = manifest().to_json()
    del value["seed"]
    with pytest.raises(Refused, match="missing fields \\['seed'\\]"):
        Manifest.from_json(value)
    with pytest.raises(Refused, match=r"holds no manifest.json"):
        Manifest.load(Folder(tmp_path))


def test_every_field_has_a_type_check() -> None:
    names = {field.name for field in dataclasses.fields(Manifest)}
    for name in names - {"schema_version", "kind"}:
        with pytest.raises(Refused):
            Manifest.from_json(manifest().to_json() | {name: object()})


@given(
    prefix=st.text(max_size=5),
    word=st.sampled_from(["KEY", "token", "Secret", "password"]),
    secret=st.text(st.characters(categories=["L", "N"]), min_size=12),
)
def test_no_secret_is_written(prefix: str, word: str, secret: str) -> None:
    value = {
        prefix + word: secret,
        "nested": [{f"a_{word}": [secret]}],
        "model_args": f"base=1,api_{word}={secret},x=2",
        "uri": f"s3://{secret}:{secret}@bucket/x",
    }
    shown = json.dumps(masked(value), ensure_ascii=False)
    assert secret not in shown and "x=2" in shown and "bucket/x" in shown


def test_a_count_of_tokens_is_no_secret_but_tokens_are() -> None:
    counts = {"max_new_tokens": 16, "model_args": "max_new_tokens=16,x=2"}
    assert masked(counts) == counts
    secrets = {"api_tokens": "abc", "hf_token": 16, "model_args": "access_tokens=abc,hf_token=16"}
    assert masked(secrets) == {"api_tokens": "***", "hf_token": "***", "model_args": "access_tokens=***,hf_token=***"}


def test_the_digest_covers_what_changes_results() -> None:
    first = arguments_digest({"model": "m", "workers": 1, "seed": 0}, ignore={"workers"})
    assert first == arguments_digest({"seed": 0, "workers": 8, "model": "m"}, ignore={"workers"})
    assert first != arguments_digest({"model": "m", "workers": 1, "seed": 1}, ignore={"workers"})


def test_versions_name_what_computes() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "ray", "pyarrow", "lmms-eval", "shortv"} <= found.keys()
    assert found["pyarrow"][0].isdigit()
