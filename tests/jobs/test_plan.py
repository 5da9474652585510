"""jobs/plan.py on a small sweep folder made by hand."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.plan import main
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
        kl_SL = np.array(means) * (1 + 0.1 * np.arange(6)[:, None])
        layers += layer_statistics(
            kl_SL, mode=mode, kl_direction=KlDirection.FULL_ABLATED, noise_floor=1e-9, seed=3, resamples=20
        )
        for sample, values in zip(used, [*kl_SL, np.zeros(5)], strict=True):
            record = partial(LcRecord, sample_id=sample.sample_id, mode=mode, top1_changed=False)
            rows += [record(layer=i, kl_full_ablated=kl, kl_ablated_full=9 - kl) for i, kl in enumerate(values)]
    folder.write_table("samples", used)
    folder.write_table("lc_samples/part-00000", rows[: len(rows) // 2])
    folder.write_table("lc_samples/part-00001", rows[len(rows) // 2 :])
    folder.write_table("lc_layers", layers)
    manifest().save(folder)
    return tmp_path / "sweep"


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


@pytest.fixture
def plan(job: Any) -> Callable[..., str]:
    """Run the job and return what it said."""

    def make(*arguments: object, status: int = 0) -> str:
        found, said = job(main, *arguments)
        assert found == status, said
        return str(said)

    return make


def test_the_job_as_a_script_from_anywhere(sweep: Path) -> None:
    """As a cluster would start it, from another folder, with nothing on the path; it refuses in one line."""
    command = [sys.executable, str(ROOT / "jobs" / "plan.py"), str(sweep), "--layers", "9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 2 and "9 layers" in done.stderr and done.stderr.count("\n") == 1


def test_the_default_plan(sweep: Path, plan: Callable[..., str]) -> None:
    said = plan(sweep)
    assert "freeze-visual in 3 of 5 layers, the first to replace first: 4, 2, 3" in said
    assert "10.0 text and 30.0 visual tokens (means of 6 samples)" in said
    assert "100% with 25% of the samples, 100% with 50% of the samples, 100% with 100% of the samples" in said
    found = Plan.load(sweep / "plans" / "freeze-visual-3.json")
    assert found.layers(Mode.FREEZE_VISUAL) == (2, 3, 4) and found.ranking == (4, 2, 3, 0, 1)
    assert found.check_fits(config_digest=ARCH.config_digest, num_layers=5, model="tiny", revision="r") != []
    assert (found.flops_t, found.flops_v, found.model) == (10, 30, "tiny")
    assert found.source is not None
    assert {"kl_direction": "full-ablated", "samples": 6, "seed": 3, "order": "lc"}.items() <= found.source.items()


def test_the_same_plan_again_and_another_in_its_place(sweep: Path, plan: Callable[..., str]) -> None:
    plan(sweep, "--layers", 2, "--name", "mine")
    file = sweep / "plans" / "mine.json"
    before = (file.stat().st_ino, file.read_bytes())
    assert "holds this plan already; nothing to do" in plan(sweep, "--layers", 2, "--name", "mine")
    said = plan(sweep, "--layers", 3, "--name", "mine", status=2)
    assert "holds something else than this plan; give another --name or --output" in said
    assert (file.stat().st_ino, file.read_bytes()) == before
    file.write_text("{")
    plan(sweep, "--layers", 2, "--name", "mine", status=2)
    assert file.read_text() == "{"


@pytest.mark.parametrize(
    ("arguments", "name", "layers"),
    [
        (["--flops_ratio", 0.7], "freeze-visual-3", (2, 3, 4)),
        (["--max_lc", 0.15], "freeze-visual-3", (2, 3, 4)),
        (["--mode", "drop-visual", "--layers", 2], "drop-visual-2", (3, 4)),
        (["--mode", "drop-visual", "--max-lc", 0.3], "drop-visual-3", (2, 3, 4)),
        (["--layers", 2, "--random", 0], "freeze-visual-2-random0", None),
        (["--layers", 2, "--first"], "freeze-visual-2-first", (0, 1)),
        (["--layers", 2, "--last"], "freeze-visual-2-last", (3, 4)),
        (["--layers", 2, "--kl_direction", "ablated-full"], "freeze-visual-2-ablated-full", (0, 1)),
        # A sample without an image counts for modes of text alone.
        (["--layers", 1, "--mode", "freeze-text"], "freeze-text-1", (4,)),
    ],
)
def test_every_way_to_choose(
    sweep: Path, plan: Callable[..., str], arguments: list[object], name: str, layers: tuple[int, ...] | None
) -> None:
    plan(sweep, *arguments, "--output_path", f"{sweep}/served/")
    found = Plan.load(sweep / "served")
    chosen = tuple(layer for layer, mode in enumerate(found.modes) if mode is not Mode.FULL)
    assert found.name == name and (len(chosen) == 2 if layers is None else chosen == layers)
    assert found.flops_ratio is not None and found.flops_ratio <= 0.95
    tokens = (6 * 10 + 100) / 7 if "freeze-text" in arguments else 10
    assert found.flops_t == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layers", "0"], "0 layers"),
        (["--layers", "1e30"], "--layers"),
        (["--flops-ratio", "0.01"], "all 5 layers give 0."),
        (["--flops-ratio", "nan"], "--flops-ratio"),
        (["--max-lc", "-1"], "the lowest is 0 at layer 4"),
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
def test_requests_that_no_plan_can_meet(
    sweep: Path, plan: Callable[..., str], arguments: list[str], named: str
) -> None:
    said = plan(sweep, *arguments, status=2)
    assert named in said and said.rstrip("\n").isprintable()
    assert not (sweep / "plans").exists()


def test_sweeps_that_cannot_carry_a_plan(sweep: Path, tmp_path: Path, plan: Callable[..., str]) -> None:
    folder = Folder(sweep)
    assert "manifest.json" in plan(tmp_path / "nothing", status=2)
    for changes, message in (
        ({"state": "running"}, "is not finished; run its command again"),
        ({"details": {}}, "does not hold the sizes of tiny"),
        (
            {"details": {"architecture": dataclasses.asdict(ARCH) | {"num_heads": 2}}},
            "or others than it was measured with",
        ),
    ):
        manifest(**changes).save(folder)
        assert message in plan(sweep, status=2)
    manifest(state="partial").save(folder)
    (sweep / "lc_samples" / "part-00000.parquet").unlink()
    assert "run the sweep again" in plan(sweep, status=2)
    (sweep / "lc_layers.parquet").write_bytes(b"PAR1")
    said = plan(sweep, status=2)
    assert "not a whole Parquet file" in said and said.count("\n") == 1


def test_a_plan_that_cannot_be_written_fails(sweep: Path, tmp_path: Path, plan: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    said = plan(sweep, "--output", tmp_path / "file" / "p.json", status=1)
    assert "could not be" in said and said.count("\n") == 1
