"""What must hold on a CUDA device; `pytest -m gpu --gpu-device cpu` runs the same bodies without one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reports.store import Folder
from shortv.bench.sweep import measure_released
from shortv.families import Batch, LoadedModel, encode, load
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.plan import Mode, modes_of_ablation
from shortv.request import Message, Request
from shortv.sweep import engine
from shortv.workers.serving.measuring import MeasuredPlan, measure_plans
from shortv.workers.serving.preparing import prepare
from tests.models import LAYERS, Spec, batch_of, loaded, random_model
from tests.tiny_model import TINY, calibration

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("llava", "qwen2.5-vl", "internvl", "gemma3")
SPECS: list[Spec] = [[3, "I", 2], ["I", 5, "I", 1], [6], [1, "I", 9]]
ABLATED = tuple(mode for mode in Mode if mode is not Mode.FULL)
PLANS = (*((mode,) * LAYERS for mode in ABLATED), *(modes_of_ablation(mode, 1, LAYERS) for mode in ABLATED))


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; skips where there is no GPU."""
    found = torch.device(request.config.getoption("--gpu-device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return found


def on_device(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[LoadedModel, Batch]:
    """A random model of a family and a padded batch, both on the device."""
    model = replace(loaded(random_model(kind).to(device, dtype)), device=device)
    return model, batch_of(kind, SPECS).on(model)


def text_logits(model: LoadedModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.model(**batch.inputs).logits
    return logits[batch.types.text_BT].float()


@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_reference_in_float32(kind: str, device: torch.device) -> None:
    model, batch = on_device(kind, device, torch.float32)
    untouched = text_logits(model, batch)
    for modes in PLANS:
        with reference(model.model, modes):
            expected = text_logits(model, batch)
        with executing(model.model, modes):
            assert (text_logits(model, batch) - expected).abs().max() <= 1e-4 * expected.abs().max()
    with executing(model.model, (Mode.FULL,) * LAYERS):
        assert torch.equal(text_logits(model, batch), untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_as_accurate_as_reference_in_half_precision(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    exact_model, exact_batch = on_device(kind, device, torch.float32)
    model, batch = on_device(kind, device, dtype)
    untouched = text_logits(model, batch)
    for modes in PLANS:
        with reference(exact_model.model, modes):
            exact = text_logits(exact_model, exact_batch)
        with reference(model.model, modes):
            slow = (text_logits(model, batch) - exact).abs().mean()
        with executing(model.model, modes):
            fast = (text_logits(model, batch) - exact).abs().mean()
        assert fast <= 2 * slow
    with executing(model.model, (Mode.FULL,) * LAYERS):
        assert torch.equal(text_logits(model, batch), untouched)


def bundled_batch(device: torch.device) -> tuple[LoadedModel, Batch]:
    model = load(str(TINY / "model"), dtype="float32", device=str(device))
    batch = encode(model, calibration()[:4]).batch
    assert batch is not None
    return model, batch


def test_the_sweep_equals_hooks_and_the_cpu(device: torch.device) -> None:
    model, batch = bundled_batch(device)
    layers = range(len(model.decoder.layers))
    measured = engine.measure(model, batch, layers=layers, modes=ABLATED)
    for layer, expected in enumerate(measure_released(model, batch)):
        found = measured.values[engine.Ablation(layer, Mode.FREEZE_VISUAL)]
        torch.testing.assert_close(found[0], expected[0], atol=1e-7, rtol=1e-3)
    on_cpu = engine.measure(*bundled_batch(torch.device("cpu")), layers=layers, modes=ABLATED)
    for ablation, value in on_cpu.values.items():
        torch.testing.assert_close(measured.values[ablation][0].cpu(), value[0], atol=1e-6, rtol=1e-3)


def test_a_sweep_that_runs_out_of_memory_stacks_fewer_ablations(device: torch.device) -> None:
    model, _ = on_device("llava", device, torch.float32)
    batch = batch_of("llava", [[30, "I", 200], ["I", 220]] * 8).on(model)

    def measure(stack: int) -> engine.BatchLC:
        return engine.measure(model, batch, layers=range(LAYERS), modes=[Mode.FREEZE_VISUAL], stack=stack)

    if device.type == "cpu":
        assert measure(LAYERS).values.keys() == measure(1).values.keys()
        return
    measure(LAYERS)  # loads kernels and their workspaces
    peaks = []
    for stack in (1, LAYERS):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        expected = measure(stack)
        peaks.append(torch.cuda.max_memory_reserved(device))
    assert peaks[0] < peaks[1]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total, device)
    try:
        found = measure(LAYERS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    for ablation, value in expected.values.items():
        torch.testing.assert_close(found.values[ablation][0], value[0], atol=1e-7, rtol=1e-3)


def job(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def gpus(device: torch.device, number: int) -> list[str]:
    """Flags for workers with so many GPUs each; none on a CPU."""
    return ["--gpus-per-worker", str(number)] if device.type == "cuda" else []


def lc_of(output: Path) -> list[Any]:
    rows = Folder(str(output)).read_table("lc_layers").to_pylist()
    return [row["mean"] for row in sorted(rows, key=lambda row: (row["mode"], row["layer"]))]


def test_one_replica_scores_as_the_model_in_process(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = tmp_path / "out"
    job("jobs/campaign.py", "--limit", "40", "--replicas", "1", *gpus(device, 1), "--output-path", str(output))
    manifest = json.loads((output / "manifest.json").read_text())
    (cell,) = Folder(str(output)).read_table("cells").to_pylist()
    assert manifest["state"] == "complete" and (cell["n"], cell["errors"]) == (40, 0)
    scores = {row["metric"]: row["value"] for row in Folder(str(output)).read_table("metrics").to_pylist()}
    assert scores["exact_match"] >= 0.97


@pytest.mark.parametrize("number", [1, 2])
def test_a_sweep_by_workers_with_gpus_gives_the_same_lc(number: int, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if device.type == "cuda" and torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs")
    command = ["jobs/lc_sweep.py", "--limit", "8", "--workers", "1", "--output-path"]
    job(*command, str(tmp_path / "out"), *gpus(device, number))
    expected = tmp_path / "cpu"
    job(*command, str(expected), *(["--gpus-per-worker", "0"] if device.type == "cuda" else []))
    for found, wanted in zip(lc_of(tmp_path / "out"), lc_of(expected), strict=True):
        assert abs(found - wanted) <= 1e-6 + 1e-3 * wanted


def test_the_full_model_under_two_names_is_equally_fast(device: torch.device) -> None:
    bundled = load(str(TINY / "model"), dtype="float32", device=str(device))
    messages = [Message(role="user", parts=(*one.images, one.prompt)) for one in calibration()[:8]]
    batch = [prepare(bundled, Request(request_id="", messages=(message,))) for message in messages]
    full, frozen = (Mode.FULL,) * 8, (Mode.FULL, *[Mode.FREEZE_VISUAL] * 7)
    plans = {
        name: MeasuredPlan(modes=modes, run=None, prepared=batch)
        for name, modes in {"": full, "same": full, "frozen": frozen}.items()
    }
    for speed in measure_plans(bundled, plans, seconds=10):
        assert (speed.peak_bytes is None) == (device.type == "cpu") and speed.peak_bytes != 0
        assert min(speed.vision_ms, speed.prefill_ms, speed.decode_ms_per_token) > 0
        assert speed.plan != "same" or abs(speed.prefill_ratio - 1) < 0.02 + 3 * speed.prefill_ratio_stderr
