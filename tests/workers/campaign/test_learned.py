"""Plans with learned parts in a campaign: named by their file, told apart by what they do, costed by what they did."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from reports.manifest import CampaignManifest
from reports.page.campaign_charts import exit_charts
from reports.page.campaign_data import read_campaign_data
from reports.store import Folder
from shortv.costs import layer_flops
from shortv.errors import Refused
from shortv.evals.scoring import Sample
from shortv.learned.dyvte import exit_flops
from shortv.learned.files import save_parts
from shortv.plan import LearnedParts, Mode, PartsKind, Plan
from shortv.workers.campaign.driver import run_campaign
from shortv.workers.campaign.plans import ModelFacts, resolve_plans
from tests.parts import ShiftParts, ShiftSettings
from tests.workers.campaign.fakes import ARCH, LAYERS, FakeRunner, recipe


def plan_file(folder: Path, name: str, threshold: float, *, digest: str = ARCH.config_digest) -> str:
    """A plan with DyVTE parts for the models of the fake runner."""
    parts = ShiftParts(4, ShiftSettings(layers=(0,)))
    header = save_parts(
        folder / "parts", parts, model="tiny", revision=None, config_digest=digest, training={"command": "none"}
    )
    named = LearnedParts(kind=PartsKind.DYVTE, path=str(folder / "parts"), digest=header.digest, threshold=threshold)
    plan = Plan.full(num_layers=LAYERS, name=name, model="tiny", config_digest=ARCH.config_digest, parts=named)
    return str(plan.save(folder / f"{name}.json"))


class LeavingRunner(FakeRunner):
    """Samples leave after layer 1, 3 or never under a plan with parts; every third has no image."""

    def _sample(self, model: str, plan: Plan | None, index: int) -> Sample:
        found = replace(super()._sample(model, plan, index), kind=("colour", "count")[index % 2])
        if index % 3 == 0:
            return replace(found, visual_tokens=0, prompt_tokens=10)
        leaves = plan is not None and plan.parts is not None
        return replace(found, exit_layer=(1, 3, LAYERS)[index // 3 % 3] if leaves else None)


def run(output: Path, plans: Sequence[str], runner: FakeRunner, **changes: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    assert run_campaign(recipe(output, plans=tuple(plans), **changes), runner=runner, console=console) == 0
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_exit_layers_are_kept_costed_and_shown(tmp_path: Path) -> None:
    files = [plan_file(tmp_path, f"at-{threshold}", threshold) for threshold in (0.5, 0.9)]
    run(tmp_path / "out", files, LeavingRunner(samples=18))
    folder = Folder(tmp_path / "out")
    cells = {row["plan"]: row for row in folder.read_table("cells").to_pylist()}
    answers = folder.read_table(f"answers/{cells['at-0.5']['cell']}").to_pylist()
    assert [row["exit_layer"] for row in answers[:9]] == [None, 1, 1, None, 3, 3, None, 8, 8]
    assert [row["kind"] for row in answers[:3]] == ["colour", "count", "colour"]
    assert set(folder.read_table(f"answers/{cells['full']['cell']}")["exit_layer"].to_pylist()) == {None}
    # Six prompts without an image, and twelve that left after these layers.
    done = [exit_flops(ARCH, LAYERS, 10, 0)] * 6 + [exit_flops(ARCH, layer, 10, 30) for layer in (1, 3, 8)] * 4
    full = 6 * LAYERS * layer_flops(ARCH, Mode.FULL, 10, 0) + 12 * LAYERS * layer_flops(ARCH, Mode.FULL, 10, 30)
    assert cells["at-0.5"]["flops_ratio"] == pytest.approx(sum(done) / full) != 1
    assert cells["full"]["flops_ratio"] == 1
    manifest = CampaignManifest.load(folder)
    assert [plan["parts"] and plan["parts"]["threshold"] for plan in manifest.plans] == [None, 0.5, 0.9]
    exits = read_campaign_data(folder).exits
    assert [(one.plan, one.kind, one.samples) for one in exits[:3]] == [
        ("at-0.5", "all", 12),
        ("at-0.5", "colour", 6),
        ("at-0.5", "count", 6),
    ]
    assert exits[0].counts == {1: 4, 3: 4, 8: 4}
    page = (tmp_path / "out" / "report.html").read_text()
    assert '"exits-0"' in page and "Exit layers of tiny on shapes" in page
    # Plan, kind, samples, layer, exits, share.
    chart = exit_charts(exits)[0]
    assert [list(row) for row in chart.numbers.rows[:3]] == [
        ["at-0.5", "all", 12, layer, 4, 1 / 3] for layer in ("1", "3", "never")
    ]
    assert sum(float(str(row["share"])) for row in chart.data["rows"]) == pytest.approx(6)


def test_a_finished_campaign_with_parts_runs_nothing_and_other_parts_run_again(tmp_path: Path) -> None:
    file = plan_file(tmp_path, "dyvte", 0.5)
    runner = LeavingRunner(samples=6)
    run(tmp_path / "out", [file], runner)
    run(tmp_path / "out", [file], runner)
    assert runner.ran == ["tiny full shapes", "tiny dyvte shapes"]
    run(tmp_path / "out", [plan_file(tmp_path, "dyvte", 0.6)], runner)
    assert runner.ran[2:] == ["tiny dyvte shapes"]


def test_plans_that_differ_in_their_parts_alone_are_no_tie_and_have_no_controls(tmp_path: Path) -> None:
    files = [plan_file(tmp_path, "one", 0.5), plan_file(tmp_path, "two", 0.6), plan_file(tmp_path, "same", 0.5)]
    found = resolve_plans(files, [ModelFacts(name="tiny", revision=None, digest=None, architecture=ARCH)])
    assert [entry.same_as for entry in found.entries["tiny"]] == [None, None, None, "one"]
    said = run(tmp_path / "out", [*files, "random:0@3"], LeavingRunner(samples=6))
    assert "same is a tie with one" in said and "random control" not in said


def test_parts_of_another_model_refuse_the_campaign(tmp_path: Path) -> None:
    file = plan_file(tmp_path, "dyvte", 0.5, digest="cd" * 32)
    with pytest.raises(Refused, match=r"were trained on tiny \(architecture cdcdcdcdcdcd\)"):
        run(tmp_path / "out", [file], FakeRunner())
    (tmp_path / "parts" / "parts.json").unlink()
    with pytest.raises(Refused, match="no learned parts at"):
        run(tmp_path / "out", [file], FakeRunner())
    assert not (tmp_path / "out").exists()
