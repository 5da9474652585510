"""What the driver refuses before work starts, and what it keeps; Ray takes part in one run whose worker is killed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from rich.console import Console
from safetensors.torch import load
from torch import Tensor

from reports.manifest import State, TrainingManifest
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.learned.system import System
from shortv.learned.training import alone
from shortv.plan import Plan
from shortv.records import ErrorRecord
from shortv.spec import ModelSpec, WorkerRange, validate
from shortv.workers.placement import Placement
from shortv.workers.run import one_driver
from shortv.workers.training import driver
from shortv.workers.training.checkpoint import latest_checkpoint, write_record, write_state
from shortv.workers.training.data import Shards, sample_of, write_shards
from shortv.workers.training.loop import SingleWorker, StepSamples, run_loop
from shortv.workers.training.spec import TrainSpec
from tests.architectures import architecture
from tests.tiny_model import TINY
from tests.workers.fakes import LAYERS, FakeEngine
from tests.workers.training.test_loop import trained
from tests.workers.training.toy import TOY, ToyOfImages, ToyRecipe, ToyTrainer, toy_samples


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


def run(place: Path, recipe: ToyRecipe | None = None, system: System = TOY, **settings: Any) -> tuple[int, str]:
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
    status = driver.run_training(spec, recipe or ToyRecipe(), system, loader=ToyEngine(), console=console)
    return status, text.getvalue()


@dataclass(frozen=True, kw_only=True)
class LocalReport:
    """Writes checkpoints where Ray Train would store them."""

    prepared: driver.Prepared

    def progress(self, row: Mapping[str, Any]) -> None:
        """Nothing is shown."""

    def checkpoint(
        self,
        step: int,
        state: Mapping[str, Tensor] | None,
        rows: Sequence[Mapping[str, Any]],
        errors: Sequence[ErrorRecord],
    ) -> None:
        place = Path(self.prepared.output) / "checkpoints" / "attempt-00001" / str(step)
        (place / "result" / "parts").mkdir(parents=True)
        write_state(place, state or {})
        (place / "result" / "parts" / "parts.json").write_text("{}")
        write_record(
            place,
            step=step,
            identity=self.prepared.manifest.arguments_digest,
            worker=0,
            workers=1,
            rows=rows,
            errors=[asdict(error) for error in errors],
        )


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train by the loop alone, from the shards, and count how often."""
    calls: list[int] = []

    def train(prepared: driver.Prepared, found: Any, console: Console) -> driver.Prepared:
        calls.append(found.step if found else 0)
        recipe, order = prepared.recipe, prepared.order
        write_shards(prepared.folder, prepared.sources, prepared.contents, needs_images=prepared.system.needs_images)
        shards = Shards(prepared.output)
        steps = [
            StepSamples(step=step, samples=tuple(map(sample_of, shards.read(order.rows(step)))))
            for step in range(recipe.steps)
        ]
        trainer, report = ToyTrainer(recipe, alone), LocalReport(prepared=prepared)
        run_loop(trainer, steps, start=0, checkpoint_every=recipe.steps, report=report, group=SingleWorker())
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
    status, _ = run(tmp_path, system=ToyOfImages(), data=data_file(tmp_path, images=images))
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


@pytest.mark.ray
@pytest.mark.parametrize("field", ["nan_at", "raises_at"])
def test_what_ends_a_training_is_one_line(tmp_path: Path, field: str) -> None:
    """The loss is NaN, or the model's library raises, as it does where memory ends."""
    with pytest.raises(ShortVError) as error:
        run(tmp_path, ToyRecipe(**{field: 5}))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert ("loss of step 6 is nan" if field == "nan_at" else "MemoryError: toy; give a smaller") in str(error.value)
    found = latest_checkpoint(str(tmp_path / "out"), TrainingManifest.load(Folder(tmp_path / "out")).arguments_digest)
    assert found is not None and found.step == 4


@pytest.mark.ray
def test_workers_that_cannot_start_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "place", lambda *_, **__: Placement(low=1, high=1, cpus=999, gpus=0))
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    with pytest.raises(ShortVError, match="Ray Train could not run 1 workers with 999 CPUs") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)


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
    assert torch.equal(vector, load(whole)["weight/vector"])
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
