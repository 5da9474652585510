"""jobs/campaign.py without a model: its settings from flags and files, and its exit status."""

import re
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from jobs.campaign import main
from jobs.common import run
from reports.store import Folder
from shortv.errors import Refused
from shortv.spec import load_spec
from shortv.workers.campaign.spec import CampaignSpec
from tests.test_spec import HOSTILE
from tests.workers.campaign.fakes import FakeWorkers

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = {"models": ["tiny"], "output_path": "out"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the job with workers that has no model; returns its status and its output."""
    workers = FakeWorkers()
    monkeypatch.setattr("shortv.workers.campaign.workers.CampaignWorkers", lambda: workers)
    monkeypatch.setattr("reports.page.write_page", lambda folder: None)

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["campaign.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    start.workers = workers  # type: ignore[attr-defined]
    return start


def test_flags_and_a_file_start_a_campaign(job: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'plans = ["first@2"]\ntasks = ["shapes"]\noutput_path = "{tmp_path}/no"\n')
    status, output = job("--config", tmp_path / "r.toml", "--plan", "last@1,last@2", "--output_path", tmp_path / "out")
    assert status == 0 and "last-2" in output and "first-2" not in output
    assert not (tmp_path / "no").exists() and (tmp_path / "out" / "comparisons.parquet").exists()
    assert [ran.split()[-2] for ran in job.workers.ran] == ["full", "last-1", "last-2"]
    # The bundled model.
    assert (ROOT / job.workers.started[0].split(":")[0]).resolve() == ROOT / "shortv/tiny/model"


def test_failures_are_status_3_and_refusals_status_2_in_one_line(job: Any, tmp_path: Path) -> None:
    job.workers.failing = frozenset({1})
    arguments = ("--task", "shapes", "--output-path", tmp_path / "out")
    assert job(*arguments)[0] == 3
    assert job(*arguments, "--fail-on-error", "0.1")[0] == 0
    job.workers.failing = frozenset()
    assert job(*arguments, "--retry-failed")[0] == 0
    for given, message in (
        ([], "--output-path"),
        (["--output-path", tmp_path / "x", "--plans", "none"], "cannot read plan"),
        (["--output-path", tmp_path / "x", "--batch-size", "0"], "--batch-size is '0'"),
    ):
        status, output = job(*given)
        assert status == 2 and message in output and output.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_power_reads_what_is_there_and_starts_nothing(job: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert job("--task", "shapes", "--plans", "first@3,last@3,exit@7", "--output-path", out)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    asked = len(job.workers.asked)
    status, output = job("--power", "0.1", "--output-path", out)
    rows = [line.split() for line in output.splitlines() if line.split()[:1] in (["first-3"], ["last-3"], ["exit-7"])]
    assert status == 0 and "on shapes, exact_match" in output and "needed for 0.1" in output
    assert [row[:2] for row in rows] == [["first-3", "60"], ["last-3", "60"], ["exit-7", "60"]]
    table = Folder(out).read_table("comparisons").to_pylist()
    for row, wanted in zip(rows, [one for one in table if one["metric"] == "exact_match"], strict=True):
        share = wanted["discordant"]
        assert row[2] == f"{share:.1%}" and row[5] == f"{ceil(7.8489 * (max(share, 0.1) - 0.01) / 0.01):,}"
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()} and len(job.workers.asked) == asked
    (tmp_path / "empty").mkdir()
    for given in (("0.1", tmp_path / "none"), ("0.1", tmp_path / "empty"), ("0", out)):
        status, output = job("--power", given[0], "--output-path", given[1])
        assert status == 2 and "Traceback" not in output
    assert job("--power", "0.1", "--output-path", tmp_path / "empty")[1].count("\n") == 1


def test_flags_have_the_form_of_lmms_eval_and_a_recipe_has_tables(tmp_path: Path) -> None:
    flags = {"gen_kwargs": "temperature=0,do_sample=False,until=</s>", "replicas": "2:4", "tasks": ("a,b",)}
    found = load_spec(CampaignSpec, flags=flags, defaults=DEFAULTS)
    assert found.gen_kwargs == {"temperature": 0, "do_sample": False, "until": "</s>"}
    assert (found.replicas, found.tasks, found.arguments()["replicas"]) == ((2, 4), ("a", "b"), [2, 4])
    file = tmp_path / "recipe.toml"
    file.write_text('limit = 10\nplans = ["${P}", "last@1"]\n[gen_kwargs]\nmax_new_tokens = 4\n')
    found = load_spec(CampaignSpec, flags={}, config=str(file), defaults=DEFAULTS, environment={"P": "first@1"})
    assert (found.limit, found.plans, found.gen_kwargs) == (10, ("first@1", "last@1"), {"max_new_tokens": 4})


def test_settings_that_cannot_be_right_are_refused_by_name(tmp_path: Path) -> None:
    for text in (
        "task = ['a']",
        "models = []",
        "output_path = ''",
        "limit = 2.5",
        "plans = [1]",
        "gen_kwargs = 'x'",
        "gen_kwargs = {a = 2026-01-01}",
    ):
        (tmp_path / "recipe.toml").write_text(text)
        with pytest.raises(Refused, match=text.split()[0]):
            load_spec(CampaignSpec, flags={}, config=str(tmp_path / "recipe.toml"), defaults=DEFAULTS)
    for name in CampaignSpec.model_fields:
        for value in HOSTILE:
            try:
                load_spec(CampaignSpec, flags={**DEFAULTS, name: value})
            except Refused as error:
                assert str(error).isprintable() and len(str(error)) < 600


def test_the_bundled_recipes_are_valid_and_the_documentation_lists_every_setting() -> None:
    for name in ("campaign", "seeds"):
        config = str(ROOT / f"shortv/tiny/{name}.toml")
        assert load_spec(CampaignSpec, flags={}, config=config, defaults={"models": ["m"]}).limit == 1000
    listed = re.findall(r"^\| `(\w+)` \| `--", (ROOT / "docs/campaigns.md").read_text(), re.MULTILINE)
    assert listed == list(CampaignSpec.model_fields)
