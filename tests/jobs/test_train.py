"""jobs/train.py as a user runs it: refusals in one line, a training end to end, and one whose driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortv
from jobs.train import main
from reports.store import Folder
from shortv.families import encode
from shortv.learned.header import read_header
from shortv.plan import Mode, Plan
from shortv.workers.training import driver
from tests.tiny_model import TINY, bundled, calibration
from tests.workers.training.test_driver import data_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--samples", "16", "-b", "2", "--checkpoint-every", "1", "--workers", "1", "--device", "cpu"]


def command(system: str, output: Path, *more: str) -> list[str]:
    return [sys.executable, "jobs/train.py", system, "--output-path", str(output), *SMALL, *more]


def train(system: str, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(system, output, *more), cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dyvte", "--threshold", "1.5"], "--threshold is"),
        (["dyvte", "--model", "some/model"], "no training samples for some/model"),
        (["dyvte", "--kinds", "nothing"], "unknown kinds of question: nothing; choose from count"),
        (["dyvte", "--samples", "8", "-b", "16"], "8 training samples are fewer than a batch of 16"),
        (["dyvte", "--threshold", "0.5", "--threshold", "0.50000001"], "2 plans would have the name dyvte-0.5"),
        (["dyvte", "--learning-rate", "1e38"], "--learning-rate is"),
        (["dyvte", "--steps", "9" * 401], "--steps is"),
        (["saisa", "--stage-1-learning-rate", "inf"], "--stage-1-learning-rate is"),
        (["saisa", "--steps", "0"], "--steps is"),
        (["saisa", "--stage-1-steps", "5000"], "--steps is 1500, of which --stage-1-steps are 5000"),
        (["saisa", "--data", "missing.parquet"], "missing.parquet does not exist"),
        (["saisa", "--model", "a\0", "--data", "a.parquet"], "--model is"),
        (["eas", "--layers", "2,99"], "layer 99 does not exist: the model has 8"),
        (["eas", "--skip", "8"], "a search for 8 of 8 layers has no choice"),
        (["eas", "--layers", "random", "--skip", "9"], "9 layers to skip of 8"),
        (["eas", "--layers", "2", "--eta", "2"], "--eta is of the search, which --layers replaces"),
        (["eas", "--layers", "one,two"], "--layers is"),
        (["eas", "--layers", "1,2", "--skip", "3"], "2 layers are listed and 3 are to be skipped"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, tmp_path: Path, job: Any) -> None:
    status, said = job(main, *arguments, "--output_path", tmp_path / "out")
    assert status == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["saisa", "--steps", "1", "--language-model", "layers"], {"joint_steps": 1, "language_model": "layers"}),
        (["dyvte", "--mean-over", "all-text", "--ce-slack", "0.1"], {"mean_over": "all-text", "ce_slack": 0.1}),
        (["eas", "--start", "xavier", "--probability", "softmax"], {"start": "xavier", "probability": "softmax"}),
        (["eas", "--no-grows", "--held_out", "0"], {"grows": False, "held_out": 0.0}),
        (["eas"], {"start": "identity", "probability": "sigmoid", "grows": True, "held_out": 0.25, "candidates": 5}),
    ],
)
def test_what_paper_and_code_choose_differently_is_an_option(
    arguments: list[str], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(driver, "run_training", lambda *given: asked.extend(given))
    assert job(main, *arguments, "--output-path", tmp_path / "out") == (0, "")
    recipe = asked[1].model_dump()
    assert {name: recipe[name] for name in expected} == expected


def test_routers_are_not_trained_without_images(tmp_path: Path, job: Any) -> None:
    arguments = ["dyvte", "--data", data_file(tmp_path), "-b", "2", "--output-path", tmp_path / "out"]
    status, said = job(main, *arguments, "--model", TINY / "model")
    assert status == 2 and "none of 10 training samples has an image" in said
    assert not (tmp_path / "out").exists()


def published_checkpoint(folder: Path) -> None:
    """The bundled model's weights under the names of the released SAISA class, its own projector in every layer."""
    stored = load_file(TINY / "model" / "model.safetensors")
    text, projector = "language_model.", "multi_modal_projector.linear_"
    content = {name.removeprefix(text): value for name, value in stored.items() if name.startswith(text)}
    for layer in range(8):
        for mine, released in {"1": "0", "2": "2"}.items():
            for kind in ("weight", "bias"):
                value = stored[f"{projector}{mine}.{kind}"]
                content[f"model.layers.{layer}.mm_projector.{released}.{kind}"] = value.clone()
    folder.mkdir()
    save_file(content, folder / "model.safetensors")


def test_a_published_checkpoint_becomes_a_plan(tmp_path: Path, job: Any) -> None:
    """Projectors that repeat the base model's own are visual tokens frozen in all layers."""
    published_checkpoint(tmp_path / "saisa-tiny")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"

    def convert(checkpoint: str) -> tuple[int, str]:
        arguments = ("--model", TINY / "model", "--output-path", out, "--parts-dtype", "float32")
        found: tuple[int, str] = job(main, "saisa-checkpoint", tmp_path / checkpoint, *arguments)
        return found

    for where, message in {"nothing": "does not exist", "empty": "has no safetensors files"}.items():
        status, said = convert(where)
        assert status == 2 and message in said and not list(out.glob("*"))
    assert convert("saisa-tiny") == (0, f"written; use the plan {out}/plans/saisa.json\n")
    plan, loaded = Plan.load(out / "plans" / "saisa.json"), bundled()
    assert plan.parts is not None and set(plan.modes) == {Mode.FREEZE_VISUAL}
    batch = encode(loaded, calibration()[:2]).batch
    assert batch is not None
    logits = []
    for each in (replace(plan, parts=None), plan):
        with torch.no_grad(), shortv.apply(loaded.model, each):
            logits.append(loaded.model(**batch.inputs, logits_to_keep=1).logits)
    assert torch.allclose(*logits, atol=1e-4)
    status, said = convert("saisa-tiny")
    assert status == 2 and "choose a new or empty --output-path" in said


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_training_end_to_end_then_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Any) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(ROOT)
    same = [*command("dyvte", out)[2:], "--width", "16", "--threshold", "0.5", "--threshold", "0.9"]
    status, said = job(main, *same, "--steps", "2")
    assert status == 0 and "dyvte parts after 2 steps, loss" in said and "samples/s" in said
    assert json.loads((out / "manifest.json").read_text())["state"] == "complete"
    assert Folder(str(out)).read_table("training").column("step").to_pylist() == [1, 2]
    digest = read_header(out / "parts").digest
    for threshold in (0.5, 0.9):
        plan = Plan.load(out / "plans" / f"dyvte-{threshold}.json")
        assert plan.parts is not None and plan.parts.threshold == threshold and plan.parts.digest == digest
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, again = job(main, *same, "--steps", "2")
    assert status == 0 and again.splitlines() == said.splitlines()[-3:]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    status, said = job(main, *same, "--steps", "3")
    assert status == 2 and "(steps 2 there, 3 here)" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("saisa", ("--steps", "6", "--stage-1-steps", "3")),
        ("dyvte", ("--steps", "6", "--width", "16")),
        ("eas", ("--steps", "6", "--search-steps", "4", "--skip", "2")),
    ],
)
def test_a_killed_driver_changes_nothing(tmp_path: Path, system: str, more: tuple[str, ...]) -> None:
    whole = train(system, tmp_path / "whole", *more)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    out = tmp_path / "killed"
    first = subprocess.Popen(
        command(system, out, *more), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("checkpoints/*/*/record.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "parts").exists(), "the run ended before it was killed"
    assert {path.suffix for path in out.glob("checkpoints/**/checkpoint_*/*")} == {".safetensors", ".json"}
    done = train(system, out, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "manifest.json").read_text())["attempts"] == 2
    assert read_header(out / "parts").digest == read_header(tmp_path / "whole" / "parts").digest
    assert [row["loss"] for row in Folder(str(out)).read_table("training").to_pylist()] == [
        row["loss"] for row in Folder(str(tmp_path / "whole")).read_table("training").to_pylist()
    ]
