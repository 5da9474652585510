"""A checkpoint is whole and of this run, or it is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reports.store import Folder
from shortv.errors import ShortVError
from shortv.learned.training import alone
from shortv.workers.training.checkpoint import CHECKPOINT_NAME, from_bytes, read_checkpoint, to_bytes
from tests.workers.training.toy import ToyRecipe, ToyTrainer, toy_samples

STATE = {"weight/a": torch.arange(6.0).view(2, 3), "step/a": torch.tensor(3.0), "flag": torch.tensor(True)}


def test_what_is_written_is_read_back() -> None:
    step, state = from_bytes(to_bytes(3, STATE, "run"), "run", "here")
    assert step == 3 and state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_one_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    content = to_bytes(3, STATE, "run")
    folder = Folder(tmp_path)
    folder.write_bytes(CHECKPOINT_NAME, content[: int(len(content) * share)])
    with pytest.raises(ShortVError, match="cut short or damaged; restore it, or delete it"):
        read_checkpoint(folder, "run")


def test_one_of_another_run_is_refused() -> None:
    with pytest.raises(ShortVError, match="belongs to another run"):
        from_bytes(to_bytes(3, STATE, "other"), "run", "here")


def test_a_state_of_other_parts_is_refused() -> None:
    trainer = ToyTrainer(ToyRecipe(), alone)
    trainer.step(toy_samples(4), 0)
    state = trainer.state()
    ToyTrainer(ToyRecipe(), alone).restore(state)
    with pytest.raises(ShortVError, match=r"vector with shape \(3,\), the trained parts \(8,\)"):
        trainer.restore({**state, "weight/vector": torch.zeros(3)})
