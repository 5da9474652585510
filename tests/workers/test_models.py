"""What the engine asks of the hub: which commit a revision names."""

from types import SimpleNamespace

import pytest

from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader
from tests.tiny_model import TINY


def test_a_revision_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "c1", "v2": "c2"}
    monkeypatch.setattr(
        "shortv.families.loading._config", lambda name, revision, _: SimpleNamespace(_commit_hash=commits[revision])
    )
    for revision, commit in commits.items():
        spec = ModelSpec(name="some/model", revision=revision, dtype="bfloat16")
        assert ModelLoader().pin(spec) == ModelSpec(name="some/model", revision=commit, dtype="bfloat16")


def test_a_folder_has_no_commit() -> None:
    spec = ModelSpec(name=str(TINY / "model"))
    assert ModelLoader().pin(spec) == spec
