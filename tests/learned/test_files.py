"""Learned parts on disk: loaded as they were saved, or refused with one line that says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.layers.apply import executing
from shortv.learned.apply import apply
from shortv.learned.base import Parts
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.files import load_parts
from shortv.learned.header import check_parts, read_header
from shortv.learned.registry import run_of
from shortv.plan import LearnedParts, PartsKind, Plan
from tests.models import batch_of, loaded, random_model
from tests.parts import ShiftSettings, plan_of, register, save_named, save_shifts
from tests.tiny_model import TINY, bundled


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
    assert header.parameters == 64 and header.train_seconds is None
    assert sorted(file.name for file in Path(named.path).iterdir()) == ["parts.json", "parts.safetensors"]


@pytest.mark.parametrize("plan_file", sorted((TINY / "learned" / "plans").glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_parts_load_and_their_saved_form_has_the_shipped_digest(plan_file: Path, tmp_path: Path) -> None:
    plan = Plan.load(plan_file)
    assert plan.parts is not None
    parts = load(plan.parts, bundled())
    with safe_open(Path(plan.parts.path) / "parts.safetensors", "pt") as stored:
        dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    assert save_named(tmp_path, bundled(), parts, dtype=dtype).digest == plan.parts.digest
    run_of(bundled().decoder, plan.modes, parts, plan.parts.threshold)


def test_a_plan_file_and_its_parts_run_where_both_were_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    plan = plan_of(model, save_shifts(tmp_path / "run" / "parts", model, layers=(2,)))
    assert plan.parts is not None
    for where in ("x.json", "plans/x.json"):
        plan.save(tmp_path / "run" / where)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    inputs = batch_of("llava", [[2, "I", 3]]).inputs
    parts = load(replace(plan.parts, path=str(tmp_path / "moved" / "parts")), model)
    with executing(model.model, plan.modes, run_of(model.decoder, plan.modes, parts, 0.5)):
        wanted_BTV = model.model(**inputs).logits
    for where in ("x.json", "plans/x.json"):
        with apply(model.model, tmp_path / "moved" / where):
            assert torch.equal(model.model(**inputs).logits, wanted_BTV)
    assert not torch.equal(model.model(**inputs).logits, wanted_BTV)


def _edit(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "parts.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def _write(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "parts.json").write_text(text)


def _cut(folder: Path) -> None:
    file = folder / "parts.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _flip(folder: Path) -> None:
    file = folder / "parts.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (shutil.rmtree, "no learned parts at"),
        (_write("{"), "parts.json"),
        (_write("[]"), "parts.json"),
        (_write('{"schema": 1, "schema": 1}'), "schema"),
        (_write("[" * 10_000), "parts.json"),
        (_write(f'{{"schema": {"9" * 5000}}}'), "5000 digits"),
        (_edit(schema=2), "schema"),
        (_edit(kind="vtw"), "kind"),
        (_edit(digest=7), "digest"),
        (_edit(settings=[1]), "settings"),
        (_edit(more=1), "more"),
        (_edit(kind="eas"), "are eas parts, the plan needs dyvte"),
        (_edit(config_digest="cd" * 32), "cd" * 32),
        (_edit(digest="cd" * 32), "cd" * 32),
        (_edit(settings={"layers": [0, 1]}), "not as they were saved"),
        (_edit(settings={"layers": "many"}), "layers"),
        (_flip, "not as they were saved"),
        (_cut, "parts.safetensors is cut short"),
        (lambda folder: (folder / "parts.safetensors").unlink(), "no parts.safetensors"),
    ],
)
def test_what_is_not_what_the_plan_names_is_refused(
    damage: Callable[[Path], Any], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path / "parts", model, layers=(1, 3))
    damage(tmp_path / "parts")
    with pytest.raises(Refused) as refusal:
        load(named, model)
    assert found in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


def test_a_width_that_the_weights_do_not_have_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    """It would take gigabytes; the digests of the damaged folder are right."""
    width = 1 << 20
    model = loaded(random_model())
    named = save_named(tmp_path, model, ExitRouters.build(model.decoder, RouterSettings(width=2)), threshold=0.5)
    header = json.loads((tmp_path / "parts.json").read_text())
    settings = {**header["settings"], "width": width}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update((tmp_path / "parts.safetensors").read_bytes())
    _edit(settings=settings, digest=digest.hexdigest())(tmp_path)
    devices: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused, match="do not fit"):
        patch.setattr(torch.nn.init, "xavier_uniform_", lambda weight: devices.append(weight.device.type))
        load(replace(named, digest=digest.hexdigest()), model)
    assert set(devices) <= {"meta"}


def test_parts_of_another_model_are_refused_without_reading_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    model, other = loaded(random_model()), loaded(random_model("qwen2-vl"))
    named = save_shifts(tmp_path, model, layers=(0,))
    _flip(tmp_path)
    assert check_parts(named, model.architecture.config_digest).digest == named.digest
    with pytest.raises(Refused, match="train parts for this model"):
        check_parts(named, other.architecture.config_digest)


def test_weights_cut_short_are_found_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = loaded(random_model())
    named = save_shifts(tmp_path, model, layers=(0,))
    weights = tmp_path / "parts.safetensors"
    content = weights.read_bytes()
    for left in (0, 100, -1):
        weights.write_bytes(content[:left])
        with pytest.raises(Refused, match="cut short"):
            check_parts(named, model.architecture.config_digest)


def test_paths_that_no_folder_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 5000, "a\0b", str(tmp_path / "loop")):
        with pytest.raises(Refused, match="no learned parts at") as refusal:
            read_header(path)
        assert len(str(refusal.value)) < 500 and str(refusal.value).isprintable()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(ShortVError, match=r"cannot write learned parts to .*choose another folder"):
        save_shifts(tmp_path / "file", loaded(random_model()), layers=(0,))
