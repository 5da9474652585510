"""Plans with learned parts in a campaign: named by their file, distinguished by their parts, with measured costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reports.manifest import CampaignManifest
from reports.page.campaign import campaign_page
from reports.page.campaign_data import read_campaign_data
from reports.store import Folder
from shortv.costs import layer_flops
from shortv.errors import Refused
from shortv.evals.scoring import ScoredSample
from shortv.learned.dyvte import exit_flops
from shortv.learned.files import save_parts
from shortv.learned.header import read_header
from shortv.plan import LearnedParts, Mode, PartsKind, Plan
from shortv.spec import load_spec
from shortv.workers.campaign.plans import ModelFacts, PlanKind, resolve_plans
from shortv.workers.campaign.spec import CampaignSpec
from tests.parts import ShiftParts, ShiftSettings
from tests.tiny_model import bundled
from tests.workers.campaign.fakes import ARCH, LAYERS, FakeWorkers, campaign, campaign_spec, make_sweep

TINY = Path(__file__).resolve().parents[3] / "shortv" / "tiny"
SHIPPED = TINY / "learned"
DYVTE, SAISA, EAS = PartsKind.DYVTE, PartsKind.SAISA, PartsKind.EAS
# Plans of seeds.toml without learned parts, in the order in which they are printed.
WITHOUT = ["full", *(f"freeze-visual-{layers}" for layers in (5, 6, 7)), "no-visual-queries-8", "no-visual-ffn-8"]
WITHOUT += [f"drop-visual-{layers}" for layers in (2, 4, 6)]


def plan_file(
    folder: Path,
    name: str,
    threshold: float | None,
    *,
    kind: PartsKind = DYVTE,
    digest: str = ARCH.config_digest,
    parts: str = "parts",
    **training: Any,
) -> str:
    """A plan with untrained parts for the models of the fake workers."""
    learned = type("ShiftParts", (ShiftParts,), {"kind": kind})(500, ShiftSettings(layers=(0, 1, 2)))
    training = {"command": "none", **training}
    header = save_parts(folder / parts, learned, model="tiny", revision=None, config_digest=digest, training=training)
    named = LearnedParts(kind=kind, path=str(folder / parts), digest=header.digest, threshold=threshold)
    modes = {DYVTE: (Mode.FULL,), SAISA: (Mode.FREEZE_VISUAL,), EAS: (Mode.SKIP_ATTENTION,)}[kind] * LAYERS
    plan = Plan(name=name, model="tiny", num_layers=LAYERS, config_digest=ARCH.config_digest, modes=modes, parts=named)
    return str(plan.save(folder / "plans" / f"{name}.json"))


class LeavingWorkers(FakeWorkers):
    """Visual tokens leave after layer 1, 3 or never under a plan with parts; every third sample has no image."""

    def sample(self, model: str, plan: Plan | None, doc: int) -> ScoredSample:
        found = replace(super().sample(model, plan, doc), kind=("colour", "count")[doc % 2])
        if doc % 3 == 0:
            return replace(found, visual_tokens=0, prompt_tokens=10)
        leaves = plan is not None and plan.parts is not None
        return replace(found, exit_layer=(1, 3, LAYERS)[doc // 3 % 3] if leaves else None)


def test_exit_layers_are_stored_costed_and_shown(tmp_path: Path) -> None:
    files = tuple(plan_file(tmp_path, f"at-{threshold}", threshold) for threshold in (0.5, 0.9))
    campaign(campaign_spec(tmp_path / "out", plans=files), LeavingWorkers(samples=18), page=True)
    folder = Folder(tmp_path / "out")
    cells = {row["plan"]: row for row in folder.read_table("cells").to_pylist()}
    rows = folder.read_tables("answers").to_pylist()
    answers = [row for row in rows if row["plan"] == "at-0.5"]
    assert [row["exit_layer"] for row in answers[:9]] == [None, 1, 1, None, 3, 3, None, 8, 8]
    assert [row["kind"] for row in answers[:3]] == ["colour", "count", "colour"]
    assert {row["exit_layer"] for row in rows if row["plan"] == "full"} == {None}
    # Six prompts without an image, and twelve that left after these layers.
    done = [exit_flops(ARCH, LAYERS, 10, 0)] * 6 + [exit_flops(ARCH, layer, 10, 30) for layer in (1, 3, 8)] * 4
    full = 6 * LAYERS * layer_flops(ARCH, Mode.FULL, 10, 0) + 12 * LAYERS * layer_flops(ARCH, Mode.FULL, 10, 30)
    assert cells["at-0.5"]["flops_ratio"] == pytest.approx(sum(done) / full) != 1
    assert cells["full"]["flops_ratio"] == 1
    manifest = CampaignManifest.load(folder)
    assert [plan["parts"] and plan["parts"]["threshold"] for plan in manifest.plans] == [None, 0.5, 0.9]
    exits = read_campaign_data(folder).answered.exits
    counted = dict.fromkeys((row["plan"], row["kind"], row["samples"]) for row in exits if row["plan"] == "at-0.5")
    assert [*counted] == [("at-0.5", "all", 12), ("at-0.5", "colour", 6), ("at-0.5", "count", 6)]
    assert '"exits-0"' in (tmp_path / "out" / "report.html").read_text()


def test_plans_that_differ_in_their_parts_alone_are_not_a_tie_and_have_no_controls(tmp_path: Path) -> None:
    files = [plan_file(tmp_path, name, threshold) for name, threshold in (("one", 0.5), ("two", 0.6), ("same", 0.5))]
    workers = LeavingWorkers(samples=6)
    output = campaign(campaign_spec(tmp_path / "out", plans=(*files, "random:0@3")), workers)
    assert "same is a tie with one" in output and "random control" not in output
    assert [ran.split()[1] for ran in workers.ran] == ["full", "one", "two", "random0-3"]


def test_missing_parts_and_those_of_another_model_are_refused(tmp_path: Path) -> None:
    file = plan_file(tmp_path, "dyvte", 0.5, digest="cd" * 32)
    with pytest.raises(Refused, match="cdcdcdcdcdcd"):
        campaign(campaign_spec(tmp_path / "out", plans=(file,)))
    (tmp_path / "parts" / "parts.json").unlink()
    with pytest.raises(Refused, match="parts"):
        campaign(campaign_spec(tmp_path / "out", plans=(file,)))
    assert not (tmp_path / "out").exists()


def seeds(**changes: Any) -> CampaignSpec:
    defaults = {"models": ["shortv/tiny/model"]}
    found = load_spec(CampaignSpec, flags={}, config=str(TINY / "seeds.toml"), defaults=defaults, environment={})
    return found.model_copy(update=changes)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a finished demo and parts of every kind, for the models of the fake workers."""
    make_sweep(tmp_path / "runs/demo")
    learned = tmp_path / "shortv/tiny/learned"
    for threshold in (0.3, 0.5, 0.9):
        plan_file(learned, f"dyvte-{threshold}", threshold, parts="dyvte", seconds=41.7)
    plan_file(learned, "saisa", None, kind=SAISA, parts="saisa", seconds=754.2)
    plan_file(learned, "eas", None, kind=EAS, parts="eas")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_campaign_of_all_systems_has_one_table_for_each_task(clone: Path) -> None:
    output = campaign(seeds(), FakeWorkers(samples=40))
    plans = [*WITHOUT, "dyvte-0.3", "dyvte-0.5", "dyvte-0.9", "eas", "saisa"]
    folder = Folder(clone / "runs/campaign-seeds")
    rows = folder.read_table("cells").to_pylist()
    assert [(row["task"], row["plan"]) for row in rows] == [
        (task, plan) for task in ("shapes_vqa", "shapes_new") for plan in plans
    ]
    learned = {row["plan"]: (row["learned_parameters"], row["train_seconds"]) for row in rows}
    assert {learned[plan] for plan in WITHOUT} == {(None, None)}
    # The header of EAS does not say how long its training took.
    assert [learned[plan] for plan in ("saisa", "dyvte-0.5", "eas")] == [(1500, 754.2), (1500, 41.7), (1500, None)]
    lines = output[output.index("shortv/tiny/model on shapes_vqa") : output.index("results in")].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 120
    heads = [line for line in lines if line.startswith("plan")]
    assert len(heads) == 2 and all(head.split()[-2:] == ["learned", "trained"] for head in heads)
    assert [line.endswith("1,500 12.6 min") for line in lines if line.startswith("saisa")] == [True, True]
    assert "than random" not in output and "tie" not in output
    page = campaign_page(read_campaign_data(folder))
    (grid,) = [grid for section in page.sections if section.title == "All differences" for grid in section.grids]
    assert list(grid.columns)[-2:] == ["learned parameters", "training seconds"]
    ends = {str(row[list(grid.columns).index("plan")]): tuple(row[-2:]) for row in grid.rows}
    assert (ends["saisa"], ends["drop-visual-4"]) == ((1500, 754.2), (None, None))


def test_without_learned_parts_there_are_no_columns_about_learning(clone: Path) -> None:
    output = campaign(seeds(plans=("all/no-visual-ffn",)), FakeWorkers(samples=8), page=True)
    page = (clone / "runs/campaign-seeds/report.html").read_text()
    assert "learned" not in output and "trained" not in output and "learned parameters" not in page


def test_the_shipped_parts_fit_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = bundled().architecture
    make_sweep(tmp_path / "runs/demo", architecture)
    (tmp_path / "shortv").symlink_to(TINY.parent)
    monkeypatch.chdir(tmp_path)
    model = ModelFacts(name="shortv/tiny/model", revision=None, digest=None, architecture=architecture)
    entries = resolve_plans(seeds().plans, [model]).entries[model.name]
    assert [entry.name for entry in entries[: len(WITHOUT)]] == WITHOUT
    learned = entries[len(WITHOUT) :]
    kinds = [entry.plan.parts.kind for entry in learned if entry.plan.parts]
    assert len(kinds) == len(learned) and kinds.count(DYVTE) >= 3 and {SAISA, EAS} <= set(kinds)
    assert {entry.kind for entry in learned} == {PlanKind.PLAN} and all(entry.same_as is None for entry in learned)
    for entry in learned:
        assert entry.training is not None and entry.training.parameters and entry.training.seconds
    # The sweep of this test has another model's name; the shipped plans give no reason to warn.
    shipped = [text for text in seeds().plans if "learned" in text]
    assert shipped and not resolve_plans(shipped, [model]).warnings
    for folder in (path.parent for path in SHIPPED.glob("*/parts.json")):
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
        assert not Path(read_header(folder).model).is_absolute()
    for path in SHIPPED.glob("plans/*.json"):
        assert f'"path": "../{Path(Plan.load(path).parts.path).name}"' in path.read_text()  # type: ignore[union-attr]
