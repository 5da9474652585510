"""A checkpoint counts when every worker's files are there in full, and is of this training or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from reports.store import Folder
from shortv.errors import ShortVError
from shortv.learned.training import alone
from shortv.workers.training import checkpoint as module
from shortv.workers.training.checkpoint import (
    checkpoint_at,
    latest_checkpoint,
    new_attempt,
    read_state,
    remove_before,
    write_record,
    write_state,
)
from tests.workers.training.toy import ToyRecipe, ToyTrainer, toy_samples

STATE = {"weight/a": torch.arange(6.0).view(2, 3), "step/a": torch.tensor(3.0), "flag": torch.tensor(True)}


def write(place: Path, step: int, *, workers: int = 1, identity: str = "run") -> Path:
    place.mkdir(parents=True)
    write_state(place, STATE)
    for worker in range(workers):
        errors = [{"sample_id": f"s{worker}"}]
        write_record(
            place, step=step, identity=identity, worker=worker, workers=workers, rows=[{"step": step}], errors=errors
        )
    return place


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 20)  # a file for each tensor
    place = write(tmp_path / "a", 3, workers=2)
    found = checkpoint_at(str(place), "run")
    assert found is not None and found.step == 3 and found.rows == ({"step": 3},)
    assert [row["sample_id"] for row in found.errors] == ["s0", "s1"]
    state = read_state(place)
    assert len(list(place.glob("*.safetensors"))) > 1 and state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_the_last_whole_checkpoint_counts(tmp_path: Path) -> None:
    """As a copy leaves it that was stopped: a file is missing, or shorter than its worker says."""
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(str(tmp_path), "run") is None and new_attempt(str(tmp_path)) == "attempt-00001"
    write(root / "attempt-00001" / "a", 2)
    whole = write(root / "attempt-00002" / "a", 4)
    for number, name in enumerate(("state-00000.safetensors", "worker-1.json")):
        (write(root / "attempt-00002" / f"missing-{number}", 6, workers=2) / name).unlink()
        cut = write(root / "attempt-00003" / f"cut-{number}", 6, workers=2) / name
        cut.write_bytes(cut.read_bytes()[:-1])
    found = latest_checkpoint(str(tmp_path), "run")
    assert found is not None and (found.step, found.path) == (4, str(whole))
    assert new_attempt(str(tmp_path)) == "attempt-00004"
    remove_before(Folder(tmp_path), found)
    assert sorted(path.name for path in root.iterdir()) == ["attempt-00002", "attempt-00003"]
    shutil.rmtree(whole)
    assert latest_checkpoint(str(tmp_path), "run") is None


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints" / "attempt-00001" / "a", 2, identity="other")
    with pytest.raises(ShortVError, match="another training"):
        latest_checkpoint(str(tmp_path), "run")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "a", 2)
    (place / "state-00000.safetensors").write_bytes(b"\xff" * 80)
    with pytest.raises(ShortVError, match="damaged"):
        read_state(place)


def test_a_state_of_other_parts_is_refused() -> None:
    trainer = ToyTrainer(ToyRecipe(), alone)
    trainer.step(toy_samples(4), 0)
    state = trainer.state()
    ToyTrainer(ToyRecipe(), alone).restore(state)
    with pytest.raises(ShortVError, match=r"vector with shape \(3,\), the trained parts \(8,\)"):
        trainer.restore({**state, "weight/vector": torch.zeros(3)})
