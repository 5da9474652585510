"""The manifest: strict on the way in, free of secrets on the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.locations import masked
from reports.manifest import RunManifest, SweepManifest, arguments_digest, versions
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from tests.reports.runs import campaign_manifest, sweep_manifest, training_manifest

RUNS: tuple[Callable[..., RunManifest], ...] = (sweep_manifest, training_manifest, campaign_manifest)


@pytest.mark.parametrize("make", RUNS)
def test_a_manifest_comes_back_as_saved_and_without_secrets(tmp_path: Path, make: Callable[..., RunManifest]) -> None:
    folder = Folder(tmp_path)
    first = make(state="running", finished=None, arguments={"layers": [0, 1], "gen_kwargs": {"hf_token": "hidden"}})
    final = first.updated(state="partial", counts={"used": 1, "errors": 1}, attempts=2, wall_seconds=3)
    for one in (first, final, final.updated(attempts=3)):
        one.save(folder)
        assert type(one).load(folder) == one
    text = (tmp_path / "manifest.json").read_text()
    assert "hidden" not in text and text.startswith('{\n  "schema_version": 1')


@pytest.mark.parametrize("make", RUNS)
def test_malformed_fields_are_refused_in_one_line_that_names_them(make: Callable[..., RunManifest]) -> None:
    value, kind = make().to_json(), type(make())
    for name in value.keys() - {"schema_version", "kind"}:
        with pytest.raises(Refused, match=name) as caught:
            kind.from_json(value | {name: object()})
        assert "\n" not in str(caught.value)
        with pytest.raises(Refused, match=name):
            kind.from_json({key: item for key, item in value.items() if key != name})
    for change in ({"surprise": 1}, {"kind": "other"}, {"schema_version": 2}, {"schema_version": True}):
        with pytest.raises(Refused, match=r"surprise|of kind|schema version"):
            kind.from_json(value | change)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 999999999999},
        {"num_layers": 0},
        {"kl_direction": "sideways"},
        {"modes": ["freeze-nothing"]},
        {"noise_floor": float("inf")},
        {"noise_floor": -1},
        {"counts": {"used": -1}},
        {"counts": {"used": 2**60}},
        {"seed": True},
        {"state": "finished\x1b[2J"},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(change))) as caught:
        SweepManifest.from_json(sweep_manifest().to_json() | change)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"noise_floor": 1e999}', '{"kind": "sweep", "kind": "x"}', '{"model": "\\ud800"}', "[]"]
)
def test_hostile_manifest_files_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShortVError) as caught:
        SweepManifest.load(Folder(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("make", RUNS)
def test_kinds_of_runs_are_told_apart(tmp_path: Path, make: Callable[..., RunManifest]) -> None:
    folder, kind = Folder(tmp_path), type(make())
    with pytest.raises(Refused, match=r"does not contain manifest.json"):
        kind.load(folder)
    make().save(folder)
    for other in {type(run()) for run in RUNS} - {kind}:
        with pytest.raises(Refused, match=f"kind '{kind.KIND}', not '{other.KIND}'"):
            other.load(folder)


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
        "slash": f"s3://ID:{secret}/{secret}@bucket/x",
    }
    shown = json.dumps(masked(value), ensure_ascii=False)
    assert secret not in shown and "x=2" in shown and "bucket/x" in shown


def test_a_count_of_tokens_is_not_a_secret_but_tokens_are() -> None:
    counts = {"max_new_tokens": 16, "model_args": "max_new_tokens=16,x=2"}
    assert masked(counts) == counts
    secrets = {"api_tokens": "abc", "hf_token": 16, "model_args": "access_tokens=abc,hf_token=16"}
    assert masked(secrets) == {"api_tokens": "***", "hf_token": "***", "model_args": "access_tokens=***,hf_token=***"}


def test_the_digest_covers_what_changes_results() -> None:
    first = arguments_digest({"model": "m", "workers": 1, "seed": 0}, ignore={"workers"})
    assert first == arguments_digest({"seed": 0, "workers": 8, "model": "m"}, ignore={"workers"})
    assert first != arguments_digest({"model": "m", "workers": 1, "seed": 1}, ignore={"workers"})
    # A cell or run of an older release continues where its digest is the same.
    assert first.startswith("ad4470ab4ce25f2b")


def test_versions_name_what_computes() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "ray", "pyarrow", "lmms-eval", "shortv"} <= found.keys()
    assert found["pyarrow"][0].isdigit()
