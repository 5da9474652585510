"""What the sweep refuses before any work: one line each, status 2, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet as pq

from jobs.lc_sweep import main
from shortv.errors import Refused
from tests.workers.fakes import make_samples, write_calibration

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "shortv/tiny/model")


def refusal(tmp_path: Path, *more: str, model: str = MODEL, calibration: str | None = None) -> str:
    calibration = calibration or write_calibration(tmp_path / "calibration.parquet", make_samples(2))
    output = str(tmp_path / "out")
    arguments = ["--model", model, "--calibration", calibration, "--output_path", output, *more]
    with pytest.raises(Refused) as caught:
        CliRunner().invoke(main, arguments, catch_exceptions=False, standalone_mode=False)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--modes", "freeze-visuals"), "unknown mode"),
        (("--modes", "full"), "changes nothing"),
        (("--workers", "4:2"), "--workers"),
        (("--workers", "many"), "--workers"),
        (("--batch_size", "0"), "--batch-size"),
        (("--limit", "1.5"), "--limit"),
        (("--limit", "nan"), "--limit"),
        (("--limit", "inf"), "--limit"),
        (("--gpus-per-worker", "nan"), "--gpus-per-worker"),
        (("--fail-on-error", "2"), "--fail-on-error"),
        (("--gpus_per_worker", "1.5"), "--gpus-per-worker"),
        (("--seed", "1e30"), "--seed"),
        (("--seed", "9" * 401), "--seed"),
        (("--workers", "9" * 5000), "--workers"),
        (("--include-path", "a\0b"), "--include-path"),
        (("--chat-template", "/no/such/file"), "chat template"),
    ],
)
def test_arguments(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    assert reason in refusal(tmp_path, *arguments)
    assert not (tmp_path / "out").exists()


def test_calibration(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a"]}), tmp_path / "lacking.parquet")
    pq.write_table(pa.table({"sample_id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("lacking", "empty", "text", "missing"):
        assert f"{name}.parquet" in refusal(tmp_path, calibration=str(tmp_path / f"{name}.parquet"))
    twice = write_calibration(tmp_path / "twice.parquet", make_samples(2))
    assert "more than one calibration source" in refusal(tmp_path, "--calibration", twice)
    assert not (tmp_path / "out").exists()


def test_models(tmp_path: Path) -> None:
    assert "no/such-model" in refusal(tmp_path, model="no/such-model")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    message = refusal(tmp_path, model=str(other))
    assert "bert" in message and "llava" in message
    assert not (tmp_path / "out").exists()


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refusal(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "relative" in refusal(tmp_path, "--output-path", "runs/demo")


def test_help_imports_neither_torch_nor_ray() -> None:
    code = "import sys; import jobs.lc_sweep; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
