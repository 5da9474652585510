"""jobs/plan.py on a small sweep folder made by hand."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jobs.common import run
from jobs.plan import make
from reports.manifest import SweepManifest
from reports.store import Folder
from shortv.plan import Mode, Plan
from shortv.records import KlDirection, LcRecord, UsedSample
from shortv.sweep.ranking import layer_statistics
from tests.architectures import architecture

ROOT = Path(__file__).resolve().parents[2]
ARCH = architecture()
# Mean LC of each layer; the other KL direction ranks the layers the other way round.
MEANS = {
    Mode.FREEZE_VISUAL: [0.3, 0.9, 0.02, 0.1, 0.0],
    Mode.DROP_VISUAL: [2.0, 0.4, 0.2, 0.1, 0.0],
    Mode.FREEZE_TEXT: [5.0, 4.0, 3.0, 2.0, 1.0],
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Six samples with 30 visual and 10 text tokens each, and one without an image and with 100 text tokens."""
    folder = Folder(tmp_path / "sweep")
    used = [
        UsedSample(sample_id=f"s{i}", dataset=None, prompt="?", answer=None, n_text=10, n_visual=30) for i in range(6)
    ]
    used.append(dataclasses.replace(used[0], sample_id="text", n_text=100, n_visual=0))
    rows: list[LcRecord] = []
    layers = []
    for mode, means in MEANS.items():
        spread = 1 + 0.1 * np.arange(6)[:, None]
        kl_SL = np.array(means) * spread
        layers += layer_statistics(
            kl_SL, mode=mode, kl_direction=KlDirection.FULL_ABLATED, noise_floor=1e-9, seed=3, resamples=20
        )
        rows += [_row(f"s{i}", mode, layer, kl_SL[i, layer]) for i in range(6) for layer in range(5)]
        rows += [_row("text", mode, layer, 0.0) for layer in range(5)]
    folder.write_table("samples", used)
    folder.write_table("lc_samples/part-00000", rows[: len(rows) // 2])
    folder.write_table("lc_samples/part-00001", rows[len(rows) // 2 :])
    folder.write_table("lc_layers", layers)
    manifest().save(folder)
    return tmp_path / "sweep"


def _row(sample_id: str, mode: Mode, layer: int, kl: float) -> LcRecord:
    return LcRecord(
        sample_id=sample_id, mode=mode, layer=layer, kl_full_ablated=kl, kl_ablated_full=9 - kl, top1_changed=False
    )


def manifest(**changes: Any) -> SweepManifest:
    fields: dict[str, Any] = {
        "state": "complete",
        "arguments": {},
        "arguments_digest": "a" * 64,
        "versions": {},
        "model": "tiny",
        "revision": None,
        "config_digest": ARCH.config_digest,
        "num_layers": 5,
        "modes": tuple(mode.value for mode in MEANS),
        "kl_direction": "full-ablated",
        "calibration_ids": (),
        "calibration_digest": "b" * 64,
        "seed": 3,
        "noise_floor": 1e-9,
        "started": "2026-01-01T00:00:00+00:00",
        "details": {"architecture": dataclasses.asdict(ARCH)},
    }
    return SweepManifest(**fields | changes)


def plan_job(*arguments: object, status: int = 0) -> str:
    """Run the job in this process and return what it said: its output, or what it wrote to stderr on failure."""
    said, failed = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["plan.py", *map(str, arguments)]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(failed),
        pytest.raises(SystemExit) as ended,
    ):
        run(make)
    assert ended.value.code == status, said.getvalue() + failed.getvalue()
    assert bool(said.getvalue()) != bool(failed.getvalue())
    return said.getvalue() + failed.getvalue()


def test_the_job_as_a_script_from_anywhere(sweep: Path) -> None:
    """The second run refuses; both as a cluster would start it, from another folder, with nothing on the path."""
    command = [sys.executable, str(ROOT / "jobs" / "plan.py"), str(sweep), "--name", "script"]
    for more, status in ([], 0), (["--layers", "1"], 2):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == status, done.stderr
        assert done.stderr.count("\n") == status // 2
    assert Plan.load(sweep / "plans" / "script.json").name == "script"


def made(folder: Path, *arguments: object) -> Plan:
    plan_job(folder, *arguments, "--output", folder / "out.json")
    plan = Plan.load(folder / "out.json")
    (folder / "out.json").unlink()
    return plan


def test_the_default_plan(sweep: Path) -> None:
    said = plan_job(sweep)
    assert "freeze-visual in 3 of 5 layers, the first to replace first: 4, 2, 3" in said
    assert "10.0 text and 30.0 visual tokens (means of 6 samples)" in said
    assert "100% with 25% of the samples, 100% with 50% of the samples, 100% with 100% of the samples" in said
    plan = Plan.load(sweep / "plans" / "freeze-visual-3.json")
    assert plan.layers(Mode.FREEZE_VISUAL) == (2, 3, 4)
    assert plan.ranking == (4, 2, 3, 0, 1)
    assert plan.check_fits(config_digest=ARCH.config_digest, num_layers=5, model="tiny", revision="r") != []
    assert (plan.flops_t, plan.flops_v, plan.model) == (10, 30, "tiny")
    assert plan.source is not None
    assert {"kl_direction": "full-ablated", "samples": 6, "seed": 3, "order": "lc"}.items() <= plan.source.items()


def test_the_same_plan_again_and_another_in_its_place(sweep: Path) -> None:
    plan_job(sweep, "--layers", 2, "--name", "mine")
    file = sweep / "plans" / "mine.json"
    before = (file.stat().st_ino, file.read_bytes())
    assert "holds this plan already; nothing to do" in plan_job(sweep, "--layers", 2, "--name", "mine")
    said = plan_job(sweep, "--layers", 3, "--name", "mine", status=2)
    assert "holds something else than this plan; give another --name or --output" in said
    assert (file.stat().st_ino, file.read_bytes()) == before
    file.write_text("{")
    plan_job(sweep, "--layers", 2, "--name", "mine", status=2)
    assert file.read_text() == "{"


def test_every_way_to_choose(sweep: Path) -> None:
    by_ratio = made(sweep, "--flops_ratio", 0.7)
    assert by_ratio.flops_ratio is not None
    assert by_ratio.flops_ratio <= 0.7
    assert made(sweep, "--max_lc", 0.15).layers(Mode.FREEZE_VISUAL) == (2, 3, 4)
    assert made(sweep, "--mode", "drop-visual", "--layers", 2).layers(Mode.DROP_VISUAL) == (3, 4)
    assert made(sweep, "--mode", "drop-visual", "--max-lc", 0.3).layers(Mode.DROP_VISUAL) == (2, 3, 4)
    random = made(sweep, "--layers", 2, "--random", 0)
    assert (random.name, len(random.layers(Mode.FREEZE_VISUAL))) == ("freeze-visual-2-random0", 2)
    assert made(sweep, "--layers", 2, "--first").layers(Mode.FREEZE_VISUAL) == (0, 1)
    assert made(sweep, "--layers", 2, "--last").name == "freeze-visual-2-last"


def test_the_other_kl_direction_ranks_anew(sweep: Path) -> None:
    plan = made(sweep, "--kl_direction", "ablated-full", "--layers", 2)
    assert (plan.name, plan.ranking) == ("freeze-visual-2-ablated-full", (1, 0, 3, 2, 4))


def test_samples_without_images_count_for_text_modes(sweep: Path) -> None:
    assert made(sweep, "--mode", "freeze-text", "--layers", 1).flops_t == pytest.approx((6 * 10 + 100) / 7)


def test_a_folder_as_output(sweep: Path, tmp_path: Path) -> None:
    plan_job(sweep, "--output_path", f"{tmp_path}/served/")
    assert Plan.load(tmp_path / "served").name == "freeze-visual-3"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layers", "0"], "0 layers"),
        (["--layers", "1e30"], "--layers"),
        (["--flops-ratio", "0.01"], "all 5 layers give 0."),
        (["--flops-ratio", "nan"], "--flops-ratio"),
        (["--max-lc", "-1"], "the lowest is 0 at layer 4"),
        (["--max-lc", "1e999"], "--max-lc"),
        (["--random", "1e30"], "--random"),
        (["--random", str(2**53)], "--random"),
        (["--mode", "no-visual-ffn"], "no-visual-ffn (it measured freeze-visual"),
        (["--mode", "drop-visual", "--first"], "control of first"),
        (["--mode", "full"], "--mode full"),
        (["--mode", "frozen"], "'frozen'"),
        (["--layers", "1", "--max-lc", "1"], "--layers and --max-lc"),
        (["--first", "--last"], "--first and --last"),
        (["--name", "a/b"], "'a/b'"),
        (["--name", "x" * 5000], "xxx"),
        (["--name", "a\x1b[2J"], r"\x1b"),
        (["--output", "a\0b"], "--output"),
    ],
)
def test_requests_that_no_plan_can_meet(sweep: Path, arguments: list[str], named: str) -> None:
    said = plan_job(sweep, *arguments, status=2)
    assert named in said and said.rstrip("\n").isprintable()
    assert not (sweep / "plans").exists()


def test_sweeps_that_cannot_carry_a_plan(sweep: Path, tmp_path: Path) -> None:
    folder = Folder(sweep)
    assert "manifest.json" in plan_job(tmp_path / "nothing", status=2)
    manifest(state="running").save(folder)
    assert "is not finished; run its command again" in plan_job(sweep, status=2)
    manifest(details={}).save(folder)
    assert "does not hold the sizes of tiny" in plan_job(sweep, status=2)
    manifest(details={"architecture": dataclasses.asdict(ARCH) | {"num_heads": 2}}).save(folder)
    assert "or others than it was measured with" in plan_job(sweep, status=2)
    manifest(state="partial").save(folder)
    (sweep / "lc_samples" / "part-00000.parquet").unlink()
    assert "run the sweep again" in plan_job(sweep, status=2)
    (sweep / "lc_layers.parquet").write_bytes(b"PAR1")
    error = plan_job(sweep, status=2)
    assert "not a whole Parquet file" in error
    assert error.count("\n") == 1


def test_a_plan_that_cannot_be_written_fails(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = plan_job(sweep, "--output", tmp_path / "file" / "p.json", status=1)
    assert "could not be" in said
    assert said.count("\n") == 1
