"""What goes wrong between the driver and Ray Train is one line; nothing of Ray is started here."""

from __future__ import annotations

from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from ray.exceptions import RayActorError

from shortv.errors import ShortVError
from shortv.workers.placement import Placement
from shortv.workers.training import fit
from shortv.workers.training.data import Order
from shortv.workers.training.worker import Failed, WorkerJob
from tests.workers.training.toy import TOY, ToyRecipe


class Events:
    """A queue that raises, or gives what the workers sent."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def get(self, timeout: float) -> Any:
        if isinstance(self._event, BaseException):
            raise self._event
        return self._event

    def shutdown(self, force: bool) -> None:
        assert force


class Running:
    """A training whose workers never end."""

    error = None

    def __init__(self, *_: Any) -> None:
        pass

    def is_alive(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (RayActorError(), "Ray failed during the training"),
        (Failed(message="the training failed with OSError: no space"), "OSError: no space"),
        (Empty(), "no training step ended for 0.01 s"),
    ],
)
def test_what_ends_a_training_is_one_line(
    event: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "Queue", lambda **_: Events(event))
    monkeypatch.setattr(fit, "_Fit", Running)
    anything: Any = None
    job = WorkerJob(
        model=anything,
        device="cpu",
        threads=1,
        system=TOY,
        recipe=ToyRecipe(),
        order=Order(samples=4, batch_size=4, seed=0),
        thresholds=(),
        parts_dtype="float32",
        output=str(tmp_path),
        identity="run",
        checkpoint_every=1,
        training={},
    )
    watcher = fit.Watcher(progress=lambda row: None, saved=lambda checkpoint: None)
    placement = Placement(low=1, high=1, cpus=1, gpus=0)
    with pytest.raises(ShortVError, match=message) as error:
        fit.fit(job, placement, workers=1, steps=7, timeout=0.01, watcher=watcher)
    assert "\n" not in str(error.value)
