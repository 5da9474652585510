"""The plans of a campaign: what each text means for a model, and which texts are refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from reports.page.campaign_data import kind_of_plan
from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.plan import Mode, Plan
from shortv.workers.campaign.plans import ModelFacts, PlanEntry, PlanKind, resolve_plans
from tests.architectures import architecture
from tests.workers.campaign.fakes import make_sweep

ARCH = architecture(num_layers=5)


def model(name: str = "tiny", sizes: Architecture = ARCH) -> ModelFacts:
    return ModelFacts(name=name, revision=None, digest=None, architecture=sizes)


def resolve(*texts: str, warnings: Sequence[str] = ()) -> dict[str, PlanEntry]:
    """Return the plans of the texts, which give warnings that name these plans."""
    found = resolve_plans(texts, [model()])
    assert len(found.warnings) == len(warnings)
    assert all(repr(name) in line for name, line in zip(warnings, found.warnings, strict=True))
    return {entry.name: entry for entry in found.entries["tiny"]}


def test_the_full_model_is_always_the_first() -> None:
    entries = resolve("first@2", "full")
    assert list(entries) == ["full", "first-2"]
    assert entries["full"].kind is PlanKind.FULL and set(entries["full"].plan.modes) == {Mode.FULL}


def test_controls() -> None:
    entries = resolve("random:0..2@3", "random:7@3", "first@2", "last@1", "last@2/no-visual-ffn")
    assert list(entries)[1:] == ["random0-3", "random1-3", "random2-3", "random7-3", *list(entries)[5:]]
    assert entries["first-2"].plan.layers(Mode.FREEZE_VISUAL) == (0, 1)
    assert entries["last-1"].plan.layers(Mode.FREEZE_VISUAL) == (4,)
    assert entries["last-2-no-visual-ffn"].plan.layers(Mode.NO_VISUAL_FFN) == (3, 4)
    assert len(entries["random7-3"].plan.layers(Mode.FREEZE_VISUAL)) == 3
    assert [entry.kind for entry in entries.values()][-3:] == [PlanKind.FIRST, PlanKind.LAST, PlanKind.LAST]


def test_a_mode_in_all_layers_and_a_fixed_exit_are_not_controls() -> None:
    entries = resolve("all/no-visual-queries", "all", "last@2/drop-visual", "last@5/no-visual-queries")
    assert entries["no-visual-queries-5"].plan.layers(Mode.NO_VISUAL_QUERIES) == (0, 1, 2, 3, 4)
    assert entries["freeze-visual-5"].plan.layers(Mode.FREEZE_VISUAL) == (0, 1, 2, 3, 4)
    assert entries["drop-visual-2"].plan.layers(Mode.DROP_VISUAL) == (3, 4)
    assert [entry.kind.value for entry in entries.values()] == ["full", "plan", "plan", "plan", "last"]
    assert entries["last-5-no-visual-queries"].same_as == "no-visual-queries-5"
    assert {kind_of_plan({"kind": "plan", "source": e.plan.source}) for e in list(entries.values())[1:4]} == {
        "other plan"
    }


def test_ranges_of_layers_stand_for_a_plan_each() -> None:
    assert list(resolve("first@1..3", "random:3..4@2..3"))[1:] == [
        *("first-1", "first-2", "first-3", "random3-2", "random4-2", "random3-3", "random4-3"),
    ]


def test_exits_after_a_number_of_layers() -> None:
    entries = resolve("exit@0", "exit@3..4", "all/drop-visual", "last@2/drop-visual")
    layers = {name: entry.plan.layers(Mode.DROP_VISUAL) for name, entry in entries.items()}
    assert layers["exit-0"] == (0, 1, 2, 3, 4) and layers["exit-3"] == (3, 4) and layers["exit-4"] == (4,)
    assert {name: entry.same_as for name, entry in entries.items() if entry.same_as} == {
        "drop-visual-5": "exit-0",
        "drop-visual-2": "exit-3",
    }
    assert {entry.kind for name, entry in entries.items() if name != "full"} == {PlanKind.PLAN}


def test_the_full_model_on_smaller_images_is_a_control(tmp_path: Path) -> None:
    entry = resolve("downsample@.50")["downsample-0.5"]
    assert entry.kind is PlanKind.DOWNSAMPLE and entry.plan.downsample == 0.5 and entry.same_as is None
    assert set(entry.plan.modes) == {Mode.FULL}
    file = entry.plan.save(tmp_path / "plan.json")
    assert resolve(str(file))["downsample-0.5"].kind is PlanKind.DOWNSAMPLE
    assert kind_of_plan({"kind": "downsample", "modes": entry.plan.modes}) == "smaller images"


def plan_file(path: Path, name: str, mode: Mode, layer: int) -> str:
    plan = Plan.of_layers(mode, [layer], num_layers=5, name=name, model="tiny", config_digest=ARCH.config_digest)
    return str(plan.save(path))


def test_choices_of_a_sweep_and_files(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "runs@2/demo", ARCH)
    entries = resolve(f"sweep:{sweep}@2", f"sweep:{sweep}@0.60", "last@2")
    assert list(resolve(f"sweep:{sweep}@1..3"))[1:] == ["freeze-visual-1", "freeze-visual-2", "freeze-visual-3"]
    by_ratio = [entry for entry in entries.values() if entry.kind is PlanKind.PLAN][-1]
    assert by_ratio.plan.flops_ratio is not None and by_ratio.plan.flops_ratio <= 0.6
    assert entries["last-2"].same_as == "freeze-visual-2"
    for name in ("b", "a"):
        plan_file(tmp_path / f"{name}.json", name, Mode.NO_VISUAL_FFN, 1)
    assert resolve(f"{tmp_path}/b.json")["b"].plan.layers(Mode.NO_VISUAL_FFN) == (1,)
    assert list(resolve(f"{tmp_path}/*.json")) == ["full", "a", "b"]


def test_the_same_plan_twice_is_one_and_two_of_a_name_are_refused(tmp_path: Path) -> None:
    assert list(resolve("first@2", "first@2/freeze-visual", warnings=["first-2"])) == ["full", "first-2"]
    assert len(resolve("random:0..4@2", "random:3..5@2", warnings=["random3-2", "random4-2"])) == 7
    file = plan_file(tmp_path / "other.json", "first-2", Mode.FREEZE_VISUAL, 3)
    with pytest.raises(Refused, match="first-2"):
        resolve("first@2", file)


def test_plans_go_to_the_models_that_they_fit(tmp_path: Path) -> None:
    models = [model(), model("large", architecture(num_layers=9)), model("tuned")]
    found = resolve_plans([f"sweep:{make_sweep(tmp_path / 's', ARCH)}@2", "last@7"], models)
    names = {name: [entry.name for entry in entries] for name, entries in found.entries.items()}
    chosen = ["full", "freeze-visual-2"]
    assert names == {"tiny": chosen, "large": ["full", "last-7"], "tuned": chosen}
    assert len(found.warnings) == 5  # two lines for tuned, whose weights may differ, and three left out
    assert sum("is left out for" in line for line in found.warnings) == 3
    with pytest.raises(Refused, match="was made for tiny with 5 layers, but large has 9"):
        resolve_plans([f"sweep:{tmp_path / 's'}@2"], models[1:2])


def test_texts_that_name_no_plan_are_refused_in_one_short_line() -> None:
    wrong = ["none.json", "none/*.json", "random@2", "first:3@2", "random:4..2@2", "random:0..9999@2", "all/full"]
    wrong += ["random:0@" + "9" * 5000, "last@6", "last@0", "last@6/drop-visual", "first@2/drop-visual", "last@2/slow"]
    wrong += ["exit@5", "exit@3/freeze-visual", "exit:1@2", "downsample@2", "downsample@1.0", "downsample@0.0"]
    wrong += ["first@3..2", "last@4..6", "random:0..99@1..99", "sweep:runs/none@2..1", "all/"]
    wrong += ["sweep:runs/none@2", "sweep:runs/none", "llava-1.5-7b", "x" * 5000 + "*", "NUL\0.json", "surrogate\ud800"]
    for text in wrong:
        with pytest.raises(Refused) as caught:
            resolve(text)
        message = str(caught.value)
        assert repr(text)[1:10] in message and message.isprintable() and len(message) < 800
