"""What the driver refuses before work starts, and what it keeps; Ray takes part in one run whose worker is killed."""

from __future__ import annotations

import io
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from ray.exceptions import RayActorError
from rich.console import Console
from safetensors.torch import load
from torch import Tensor

from reports.manifest import State, TrainingManifest
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.learned.system import System
from shortv.plan import Plan
from shortv.records import ErrorRecord
from shortv.spec import ModelSpec, WorkerRange, validate
from shortv.workers.placement import Placement
from shortv.workers.run import one_driver
from shortv.workers.training import checkpoint, driver, fit, worker
from shortv.workers.training.checkpoint import (
    latest_checkpoint,
    new_attempt,
    read_state,
    remove_before,
    write_checkpoint,
)
from shortv.workers.training.data import batches_of_worker
from shortv.workers.training.loop import Row
from shortv.workers.training.spec import TrainSpec
from tests.architectures import architecture
from tests.tiny_model import TINY
from tests.workers.fakes import LAYERS, FakeEngine
from tests.workers.training.toy import Recorded, Toy, ToyRecipe, ToyTrainer, loop, toy_samples, trained


@dataclass(frozen=True, kw_only=True)
class ToyEngine(FakeEngine):
    """A model that is an architecture and nothing else."""

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> Any:
        empty: Any = None
        return LoadedModel(
            name=spec.name,
            revision=None,
            model=empty,
            processor=empty,
            decoder=empty,
            architecture=architecture(num_layers=LAYERS),
            device=torch.device("cpu"),
            family=empty,
            visual_ids=frozenset(),
            context=1,
            chat_template=None,
        )


def data_file(place: Path, number: int = 10, **columns: Any) -> str:
    rows = toy_samples(number)
    table = {
        "sample_id": [row.sample_id for row in rows],
        "images": pa.array([[] for _ in rows], pa.list_(pa.binary())),
        "prompt": [row.prompt for row in rows],
        "answer": [row.answer for row in rows],
        **columns,
    }
    pq.write_table(pa.table(table), place / "data.parquet")
    return str(place / "data.parquet")


def run(place: Path, recipe: ToyRecipe | None = None, system: System | None = None, **settings: Any) -> tuple[int, str]:
    """Train into `place`/out; returns the exit status and what was printed."""
    text = io.StringIO()
    given: dict[str, Any] = {
        "model": str(TINY / "model"),
        "output_path": str(place / "out"),
        "checkpoint_every": 2,
        "workers": 1,
        "device": "cpu",
        **settings,
    }
    spec = validate(TrainSpec, {"data": (given.pop("data", None) or data_file(place),), **given})
    console = Console(file=text, width=200)
    status = driver.run_training(spec, recipe or ToyRecipe(), system or Toy(), loader=ToyEngine(), console=console)
    return status, text.getvalue()


def write(place: Path, step: int) -> Path:
    """Write a checkpoint as a worker does."""
    place.mkdir(parents=True)
    state = {"weight/a": torch.arange(6.0).view(2, 3), "flag": torch.tensor(True)}
    write_checkpoint(place, state, step=step, identity="run", rows=[{"step": step}], errors=[])
    return place


class LocalReport(Recorded):
    """Writes checkpoints where Ray Train would store them."""

    def __init__(self, prepared: driver.Prepared) -> None:
        super().__init__()
        self._prepared = prepared

    def save(
        self, step: int, state: Mapping[str, Tensor], rows: Sequence[Row], errors: Mapping[str, ErrorRecord]
    ) -> None:
        place = Path(self._prepared.output) / "checkpoints" / "attempt-00001" / str(step)
        (place / "result" / "parts").mkdir(parents=True)
        (place / "result" / "parts" / "parts.json").write_text("{}")
        found, identity = [asdict(error) for error in errors.values()], self._prepared.manifest.arguments_digest
        write_checkpoint(place, state, step=step, identity=identity, rows=rows, errors=found)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train by the loop alone, from the shards, and count how often."""
    calls: list[int] = []

    def train(prepared: driver.Prepared, found: Any, console: Console) -> driver.Prepared:
        calls.append(found.step if found else 0)
        recipe, output = prepared.recipe, prepared.output
        prepared.data.write_shards(prepared.folder, prepared.contents)
        batches = batches_of_worker(output, prepared.order, start=0, steps=recipe.steps, worker=0, workers=1)
        loop(ToyTrainer(recipe), list(batches), every=recipe.steps, into=LocalReport(prepared))
        return prepared

    monkeypatch.setattr(driver, "_train", train)
    return calls


def test_a_finished_training_run_again_does_nothing_and_says_the_same(tmp_path: Path, without_ray: list[int]) -> None:
    status, text = run(tmp_path)
    assert status == 0 and "parts after 7 steps, loss" in text and without_ray == [0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again, same = run(tmp_path)
    assert (again, same) == (0, text) and without_ray == [0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    out = Folder(str(tmp_path / "out"))
    assert out.read_table("training").num_rows == 7
    assert [name for name in out.list() if name[0] != "."] == ["manifest.json", "parts/parts.json", "training.parquet"]


def test_unusable_samples_are_rows_and_a_status(tmp_path: Path, without_ray: list[int]) -> None:
    prompts = ["bad" if index == 4 else "good" for index in range(10)]
    data = data_file(tmp_path, prompt=prompts)
    status, text = run(tmp_path, data=data)
    assert status == 3 and "1 samples could not be used" in text
    out = Folder(str(tmp_path / "out"))
    assert [row["sample_id"] for row in out.read_table("errors").to_pylist()] == ["s4"]
    assert TrainingManifest.load(out).state is State.PARTIAL
    assert run(tmp_path, data=data, fail_on_error=0.1)[0] == 0


def test_text_is_left_out_of_a_training_on_images_from_the_start(tmp_path: Path, without_ray: list[int]) -> None:
    """A worker's share of a batch may be text alone, and a training must not end of that."""
    images = pa.array([[b"image"] if index % 2 else [] for index in range(10)], pa.list_(pa.binary()))
    status, _ = run(tmp_path, system=Toy(needs_images=True), data=data_file(tmp_path, images=images))
    out = Folder(str(tmp_path / "out"))
    assert status == 3 and TrainingManifest.load(out).counts == {"steps": 7, "samples": 10, "errors": 5}
    rows = out.read_table("errors").to_pylist()
    assert [(row["sample_id"], row["error"]) for row in rows] == [
        (f"s{index}", "no-image") for index in range(0, 10, 2)
    ]


def test_a_driver_killed_after_the_last_step_only_writes_the_result(
    tmp_path: Path, without_ray: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish_result", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert TrainingManifest.load(Folder(str(tmp_path / "out"))).state is State.RUNNING
    assert run(tmp_path)[0] == 0 and without_ray == [0]
    assert TrainingManifest.load(Folder(str(tmp_path / "out"))).attempts == 2


def test_another_recipe_on_the_same_folder_is_refused_with_what_differs(tmp_path: Path, without_ray: list[int]) -> None:
    run(tmp_path)
    with pytest.raises(Refused, match=r"another training \(learning-rate 0.1 there, 0.2 here\)"):
        run(tmp_path, ToyRecipe(learning_rate=0.2))
    with pytest.raises(Refused, match="data-digest"):
        run(tmp_path, data=data_file(tmp_path, number=11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: {"data": data_file(place, number=3)}, "3 training samples are fewer than a batch of 4"),
        (lambda place: {"data": data_file(place, answer=[None, " "] + ["x"] * 8)}, "2 of 10 .* 's0'"),
        (lambda _: {"checkpoint_every": 0}, "--checkpoint-every is 0"),
        (lambda _: {"threshold": (0.5, 1.5)}, "--threshold is 1.5"),
        (lambda _: {"timeout": 0}, "--timeout is 0"),
        (lambda _: {"timeout": math.nan}, "--timeout is nan"),
        (lambda _: {"limit": math.inf}, "--limit is inf"),
        (lambda _: {"limit": 1.5}, "--limit is 1.5"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, without_ray: list[int], change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        run(tmp_path, **change(tmp_path))
    assert not (tmp_path / "out").exists() and not without_ray


def test_folders_of_others_are_refused(tmp_path: Path, without_ray: list[int]) -> None:
    folder = Folder(tmp_path / "out")
    with one_driver(folder), pytest.raises(Refused, match="in use by process"):
        run(tmp_path)
    folder.write_bytes("something.txt", b"of mine")
    with pytest.raises(Refused, match=r"1 files \(something.txt\) and no training"):
        run(tmp_path)


def test_workers_share_a_batch_evenly() -> None:
    pool = Placement(low=3, high=3, cpus=1, gpus=0)
    with pytest.raises(Refused, match="3 workers cannot share a batch of 4"):
        driver.workers_of(pool, WorkerRange(3, 3), 4)
    assert driver.workers_of(pool, None, 4) == 2
    assert driver.workers_of(pool, WorkerRange(1, 3), 6) == 3


def test_the_last_whole_checkpoint_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a copy leaves it that was stopped: a file is missing, or shorter than the record says."""
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 20)  # a file for each tensor
    root, out = tmp_path / "checkpoints", str(tmp_path)
    assert latest_checkpoint(out, "run") is None and new_attempt(out) == "attempt-00001"
    write(root / "attempt-00001" / "a", 2)
    whole = write(root / "attempt-00002" / "a", 4)
    for number, name in enumerate(("state-00001.safetensors", "record.json")):
        (write(root / "attempt-00002" / f"missing-{number}", 6) / name).unlink()
        cut = write(root / "attempt-00003" / f"cut-{number}", 6) / name
        cut.write_bytes(cut.read_bytes()[:-1])
    found = latest_checkpoint(out, "run")
    assert found is not None and (found.step, found.path, found.rows) == (4, str(whole), [{"step": 4}])
    assert {name: value.tolist() for name, value in read_state(whole).items()} == {
        "weight/a": [[0, 1, 2], [3, 4, 5]],
        "flag": True,
    }
    assert new_attempt(out) == "attempt-00004"
    remove_before(Folder(tmp_path), found)
    assert sorted(path.name for path in root.iterdir()) == ["attempt-00002", "attempt-00003"]
    with pytest.raises(ShortVError, match="another training"):
        latest_checkpoint(out, "another")
    (whole / "state-00000.safetensors").write_bytes(b"\xff" * 80)
    with pytest.raises(ShortVError, match="damaged"):
        read_state(whole)
    shutil.rmtree(whole)
    assert latest_checkpoint(out, "run") is None


class Events:
    """A queue that raises, or gives what the workers sent."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def get(self, timeout: float) -> Any:
        if isinstance(self._event, RayActorError | Empty):
            raise self._event
        return self._event

    def shutdown(self, force: bool) -> None:
        assert force


class Hanging:
    """A training that ends with the test."""

    fit = staticmethod(threading.Event().wait)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (RayActorError(), "Ray failed during the training"),
        (ShortVError("the training failed with OSError: no space"), "OSError: no space"),
        (Empty(), "no training step ended for 0.01 s"),
    ],
)
def test_what_goes_wrong_between_driver_and_ray_train_is_one_line(
    event: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "Queue", lambda **_: Events(event))
    monkeypatch.setattr(fit, "trainer_of", lambda *_: Hanging)
    monkeypatch.setattr(driver, "remote_model", lambda *_: None)
    monkeypatch.setattr("shortv.workers.cluster.connected", nullcontext)
    monkeypatch.setattr("shortv.workers.cluster.free_nodes", list)
    with pytest.raises(ShortVError, match=message) as error:
        run(tmp_path, timeout=0.01)
    assert "\n" not in str(error.value)


def test_an_error_of_the_models_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory ends."""

    def training(_: Any) -> None:
        raise MemoryError("toy\nand a traceback")

    sent: list[ShortVError] = []
    monkeypatch.setattr(worker, "_Training", training)
    worker.train_worker({"job": SimpleNamespace(events=SimpleNamespace(put=sent.append))})
    assert "MemoryError: toy" in str(sent[0]) and "give a smaller --batch-size" in str(sent[0])
    assert "\n" not in str(sent[0])


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ShortVError, match="loss of step 6 is nan") as error:
        run(tmp_path, ToyRecipe(nan_at=5))
    assert "\n" not in str(error.value)
    found = latest_checkpoint(str(tmp_path / "out"), TrainingManifest.load(Folder(tmp_path / "out")).arguments_digest)
    assert found is not None and found.step == 4


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_cannot_start_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "place", lambda *_, **__: Placement(low=1, high=1, cpus=999, gpus=0))
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    with pytest.raises(ShortVError, match="Ray Train could not run 1 workers with 999 CPUs") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_die_again_and_again_end_the_training(tmp_path: Path) -> None:
    recipe = ToyRecipe(dies_at=1, marker=str(tmp_path / "missing" / "marker"))
    with pytest.raises(ShortVError, match="workers died 3 times after step 0") as error:
        run(tmp_path, recipe)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    recipe = ToyRecipe(dies_at=3, marker=str(marker))
    status, text = run(tmp_path, recipe)
    assert status == 0, text
    out = tmp_path / "out"
    assert marker.exists()
    whole = trained(ToyRecipe(), toy_samples(10)).states[7]
    vector = load((out / "parts" / "parts.safetensors").read_bytes())["vector"]
    assert torch.equal(vector, whole["weight/vector"])
    rows = Folder(str(out)).read_table("training").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 8))
    plan = Plan.load(out / "plans" / "toy.json")
    assert plan.parts is not None and Path(plan.parts.path) == out / "parts"
    assert run(tmp_path, recipe)[1].splitlines()[-2:] == text.splitlines()[-2:]


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_train_as_one_does(tmp_path: Path) -> None:
    status, text = run(tmp_path, workers=2)
    out = Folder(tmp_path / "out")
    assert status == 0 and TrainingManifest.load(out).details["workers"] == 2, text
    losses = [row["loss"] for row in out.read_table("training").to_pylist()]
    assert losses == pytest.approx([row["loss"] for row in trained(ToyRecipe(), toy_samples(10)).rows], rel=1e-5)
