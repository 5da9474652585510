"""Learned parts on disk: given back as they were saved, or refused with a line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.families.parts import Learned, Parts, load_parts, read_header
from shortv.families.parts.files import check_parts
from shortv.families.parts.table import PARTS
from shortv.layers.apply import apply, executing
from shortv.plan import LearnedParts, Mode, PartsKind, Plan
from tests.models import batch_of, loaded, random_model
from tests.parts import ShiftSettings, plan_of, register, save_shifts


def load(named: LearnedParts, model: LoadedModel) -> Parts:
    return load_parts(named, model.decoder, model.architecture)


def test_parts_come_back_in_the_models_dtype_and_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model().to(torch.bfloat16))
    named = save_shifts(tmp_path / "new" / "parts", model, layers=(1, 3))
    parts: Any = load(named, model)
    wanted_2D = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for shift_D, wanted_D in zip(parts.shifts, wanted_2D, strict=True):
        assert torch.equal(shift_D, wanted_D.to(torch.bfloat16)) and not shift_D.requires_grad
    assert parts.settings == ShiftSettings(layers=(1, 3)) and not parts.training
    header = read_header(named.path)
    assert (header.model, header.kind, header.training) == ("random", PartsKind.DYVTE, {"command": "none"})
    assert sorted(file.name for file in Path(named.path).iterdir()) == ["parts.json", "parts.safetensors"]


def test_the_digest_is_that_of_weights_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    saved = [
        save_shifts(tmp_path / str(place), model, seed=seed, layers=layers).digest
        for place, (seed, layers) in enumerate([(0, (1, 3)), (0, (1, 3)), (1, (1, 3)), (0, (1, 2))])
    ]
    assert saved[0] == saved[1] and len(set(saved)) == 3


def test_a_plan_file_and_its_parts_run_where_both_were_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    plan = plan_of(model, save_shifts(tmp_path / "run" / "parts", model, layers=(2,)))
    for where in ("x.json", "plans/x.json"):
        plan.save(tmp_path / "run" / where)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    inputs = batch_of("llava", [[2, "I", 3]]).inputs
    with executing(model.model, plan.modes, Learned(parts=load(_moved(plan, tmp_path), model), threshold=0.5)):
        wanted_BTV = model.model(**inputs).logits
    for where in ("x.json", "plans/x.json"):
        with apply(model.model, tmp_path / "moved" / where):
            assert torch.equal(model.model(**inputs).logits, wanted_BTV)
    assert not torch.equal(model.model(**inputs).logits, wanted_BTV)


def _moved(plan: Plan, folder: Path) -> LearnedParts:
    assert plan.parts is not None
    return replace(plan.parts, path=str(folder / "moved" / "parts"))


def _edit(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "parts.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def _cut(folder: Path) -> None:
    file = folder / "parts.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _turn(folder: Path) -> None:
    file = folder / "parts.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no learned parts at .*: No such file or directory; give a folder with parts\.json"),
        (lambda folder: (folder / "parts.json").write_text("{"), r"parts\.json is no header of learned parts"),
        (lambda folder: (folder / "parts.json").write_text("[]"), r"no header.*train the parts again"),
        (_edit(schema=2), "another schema"),
        (_edit(kind="vtw"), "'vtw' is not a valid PartsKind"),
        (_edit(digest=7), "digests are texts"),
        (_edit(settings=[1]), "settings and training are objects"),
        (_edit(more=1), "unexpected keyword"),
        (_edit(kind="eas"), "are eas parts, the plan needs dyvte"),
        (_edit(config_digest="cd" * 32), r"were trained on random \(architecture cdcdcdcdcdcd\), and this model has"),
        (_edit(digest="cd" * 32), r"\(cdcdcdcdcdcd\) are not those that the plan names"),
        (_edit(settings={"layers": [0, 1]}), "not as they were saved: changed, or cut short; train the parts again"),
        (_turn, "not as they were saved: changed, or cut short; train the parts again, or restore the folder"),
        (_cut, r"parts\.safetensors is cut short, or no file of weights \(.*\); train the parts again, or restore"),
        (
            lambda folder: (folder / "parts.safetensors").write_bytes(b""),
            r"parts\.safetensors is cut short, or no file",
        ),
        (lambda folder: (folder / "parts.safetensors").unlink(), r"holds parts\.json and no parts\.safetensors"),
    ],
)
def test_what_is_not_what_the_plan_names_is_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path / "parts", model, layers=(1, 3))
    damage(tmp_path / "parts")
    with pytest.raises(Refused, match=message) as refusal:
        load(named, model)
    assert "\n" not in str(refusal.value)


def test_parts_of_another_model_are_refused_without_reading_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    model, other = loaded(random_model()), loaded(random_model("qwen2-vl"))
    named = save_shifts(tmp_path, model, layers=(0,))
    _turn(tmp_path)
    assert check_parts(named, model.architecture.config_digest).digest == named.digest
    with pytest.raises(Refused, match="train parts for this model"):
        check_parts(named, other.architecture.config_digest)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_weights_cut_short_are_found_without_a_model(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(0,))
    weights = tmp_path / "parts.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(Refused, match="cut short"):
        check_parts(named, model.architecture.config_digest)


def test_weights_that_do_not_fit_the_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(0,))
    monkeypatch.setattr(kind, "parse_settings", lambda content: ShiftSettings(layers=(0, 1)))
    with pytest.raises(Refused, match=r"the weights in .* do not fit: .*train the parts again") as refusal:
        load(named, model)
    assert "\n" not in str(refusal.value)


def test_kinds_that_this_version_lacks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(0,))
    parts = load(named, model)
    monkeypatch.delitem(PARTS, PartsKind.DYVTE)
    with pytest.raises(Refused, match="this version has no dyvte parts"):
        load(named, model)
    monkeypatch.setattr("shortv.layers.learned.LEARNED", {})
    with (
        pytest.raises(Refused, match="this version runs no dyvte parts"),
        executing(model.model, (Mode.FULL,) * 4, Learned(parts=parts, threshold=0.5)),
    ):
        pass
    # The refusal leaves the model as it was.
    with executing(model.model, (Mode.DROP_VISUAL,) * 4):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(ShortVError, match=r"cannot write learned parts to .*choose another folder"):
        save_shifts(tmp_path / "file", loaded(random_model()), layers=(0,))
