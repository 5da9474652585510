"""What the driver refuses before work starts, and what it keeps; Ray takes part in one run whose worker is killed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from rich.console import Console
from safetensors.torch import load

from reports.manifest import State, TrainingManifest
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.plan import PartsKind, Plan
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.placement import Placement
from shortv.workers.run import one_driver
from shortv.workers.training import driver
from shortv.workers.training.checkpoint import CHECKPOINT_NAME, to_bytes
from shortv.workers.training.keeping import Keeper
from shortv.workers.training.messages import Saved, Trained, Unusable
from shortv.workers.training.request import TrainRequest
from tests.architectures import architecture
from tests.tiny_model import TINY
from tests.workers.fakes import LAYERS, FakeEngine
from tests.workers.training.test_loop import trained
from tests.workers.training.toy import TOY, ToyOfImages, ToyRecipe, toy_samples


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


def request(place: Path, recipe: ToyRecipe | None = None, **more: Any) -> TrainRequest:
    given: dict[str, Any] = {
        "model": ModelSpec(name=str(TINY / "model")),
        "kind": PartsKind.SAISA,
        "recipe": recipe or ToyRecipe(),
        "output_path": str(place / "out"),
        "checkpoint_every": 2,
        "workers": WorkerRange(1, 1),
        "device": "cpu",
    }
    given |= more
    return TrainRequest(data=given.pop("data", None) or (data_file(place),), **given)


def run(wanted: TrainRequest) -> tuple[int, str]:
    text = io.StringIO()
    status = driver.run_training(wanted, system=TOY, engine=ToyEngine(), console=Console(file=text, width=200))
    return status, text.getvalue()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train by the loop alone, and count how often."""
    calls: list[int] = []

    def train(prepared: driver.Prepared, keeper: Keeper, console: Console) -> dict[str, Any]:
        calls.append(keeper.step)
        prepared.record.save(prepared.folder)
        report = trained(prepared.request.recipe, prepared.samples)
        step = prepared.request.recipe.steps
        keeper.handle(Saved(step=step, content=report.kept[step], rows=tuple(report.rows)))
        if report.bad:
            keeper.handle(Unusable(errors=tuple(report.bad)))
        keeper.handle(Trained(files={"parts/parts.json": b"{}"}))
        return {"device": "cpu", "workers": 1}

    monkeypatch.setattr(driver, "_train_on_ray", train)
    return calls


def test_a_finished_training_run_again_does_nothing_and_says_the_same(tmp_path: Path, without_ray: list[int]) -> None:
    status, text = run(request(tmp_path))
    assert status == 0 and "parts after 7 steps, loss" in text and without_ray == [0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again, same = run(request(tmp_path))
    assert (again, same) == (0, text) and without_ray == [0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert Folder(str(tmp_path / "out")).read_table("training").num_rows == 7


def test_unusable_samples_are_rows_and_a_status(tmp_path: Path, without_ray: list[int]) -> None:
    prompts = ["bad" if index == 4 else "good" for index in range(10)]
    wanted = request(tmp_path, data=(data_file(tmp_path, prompt=prompts),))
    status, text = run(wanted)
    assert status == 3 and "1 samples could not be used" in text
    out = Folder(str(tmp_path / "out"))
    assert [row["sample_id"] for row in out.read_table("errors").to_pylist()] == ["s4"]
    assert TrainingManifest.load(out).state is State.PARTIAL
    assert run(replace(wanted, fail_on_error=0.1))[0] == 0


def test_text_is_left_out_of_a_training_on_images_from_the_start(tmp_path: Path) -> None:
    """A worker's share of a batch may be text alone, and a training must not end of that."""
    images = pa.array([[b"image"] if index % 2 else [] for index in range(10)], pa.list_(pa.binary()))
    wanted = request(tmp_path, data=(data_file(tmp_path, images=images),))
    prepared = driver.prepare(wanted, ToyOfImages(), ToyEngine())
    assert [sample.sample_id for sample in prepared.samples] == ["s1", "s3", "s5", "s7", "s9"]
    assert prepared.order.samples == 5 and prepared.record.counts["samples"] == 10
    keeper = Keeper(prepared.folder, "run")
    driver._begin(prepared, keeper)
    rows = prepared.folder.read_table("errors").to_pylist()
    assert [(row["sample_id"], row["error"]) for row in rows] == [
        (f"s{index}", "no-image") for index in range(0, 10, 2)
    ]


def test_another_recipe_on_the_same_folder_is_refused_with_what_differs(tmp_path: Path, without_ray: list[int]) -> None:
    run(request(tmp_path))
    with pytest.raises(Refused, match=r"another training \(learning-rate 0.1 there, 0.2 here\)"):
        run(request(tmp_path, ToyRecipe(learning_rate=0.2)))
    with pytest.raises(Refused, match="data-digest"):
        run(request(tmp_path, data=(data_file(tmp_path, number=11),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: {"data": (data_file(place, number=3),)}, "3 training samples are fewer than a batch of 4"),
        (
            lambda place: {"data": (data_file(place, answer=[None, " "] + ["x"] * 8),)},
            "2 of 10 .* 's0'.*no answer|no answer",
        ),
        (lambda place: {"recipe": ToyRecipe(steps=0)}, "--steps is 0"),
        (lambda place: {"checkpoint_every": 0}, "--checkpoint-every is 0"),
        (lambda place: {"thresholds": (0.5, 1.5)}, "--threshold is 1.5; give an exit probability"),
        (lambda place: {"timeout": 0}, "--timeout is 0"),
        (lambda place: {"timeout": math.nan}, "--timeout is nan"),
        (lambda place: {"limit": math.inf}, "--limit is inf"),
        (lambda place: {"limit": math.nan}, "--limit is nan"),
        (lambda place: {"limit": 1.5}, "--limit is 1.5"),
        (lambda place: {"recipe": ToyRecipe(seed=2**63)}, "--seed is 9223372036854775808"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, without_ray: list[int], change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        run(request(tmp_path, **change(tmp_path)))
    assert not (tmp_path / "out").exists() and not without_ray


def test_folders_of_others_are_refused(tmp_path: Path, without_ray: list[int]) -> None:
    wanted = request(tmp_path)
    folder = Folder(wanted.output_path)
    with one_driver(folder), pytest.raises(Refused, match="in use by process"):
        run(wanted)
    folder.write_bytes("something.txt", b"of mine")
    with pytest.raises(Refused, match=r"1 files \(something.txt\) and no training"):
        run(wanted)


def test_workers_share_a_batch_evenly() -> None:
    pool = Placement(low=3, high=3, cpus=1, gpus=0)
    with pytest.raises(Refused, match="3 workers cannot share a batch of 4"):
        driver.workers_of(pool, WorkerRange(3, 3), 4)
    assert driver.workers_of(pool, None, 4) == 2
    assert driver.workers_of(pool, WorkerRange(1, 3), 6) == 3


def test_rows_ahead_of_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    report = trained(ToyRecipe(), toy_samples(10))
    folder = Folder(tmp_path)
    keeper = Keeper(folder, "run")
    for step in (1, 2, 3):
        keeper.handle(Saved(step=step, content=report.kept[step], rows=(report.rows[step - 1],)))
    # As a driver leaves it that is killed between table and checkpoint.
    folder.write_bytes(CHECKPOINT_NAME, report.kept[2])
    again = Keeper(folder, "run")
    assert again.step == 2 and [row.step for row in again.rows] == [1, 2]
    assert again.rows == keeper.rows[:2]
    folder.write_bytes(CHECKPOINT_NAME, to_bytes(2, {}, "other"))
    with pytest.raises(ShortVError, match="another run"):
        Keeper(folder, "run")


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    recipe = ToyRecipe(dies_at=3, marker=str(marker))
    status, text = run(request(tmp_path, recipe))
    assert status == 0, text
    out = tmp_path / "out"
    assert marker.exists()
    whole = trained(ToyRecipe(), toy_samples(10)).kept[7]
    vector = load((out / "parts" / "parts.safetensors").read_bytes())["vector"]
    assert torch.equal(vector, load(whole)["weight/vector"])
    rows = Folder(str(out)).read_table("training").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 8))
    plan = Plan.load(out / "plans" / "toy.json")
    assert plan.parts is not None and Path(plan.parts.path) == out / "parts"
    assert run(request(tmp_path, recipe))[1].splitlines()[-2:] == text.splitlines()[-2:]
