"""Plans that name learned parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shortv.costs import flops_ratio, layer_flops, plan_flops
from shortv.errors import Refused
from shortv.learned.registry import plan_flops_ratio
from shortv.learned.saisa import saisa_flops_ratio
from shortv.plan import LearnedParts, Mode, PartsKind, Plan, digest_of
from tests.architectures import architecture

DIGEST = "ab" * 32
PARTS = LearnedParts(kind=PartsKind.DYVTE, path="/parts/dyvte", digest="cd" * 32, threshold=0.5)
PLAN = Plan.full(num_layers=4, name="dyvte", model="org/model", config_digest=DIGEST, parts=PARTS)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    other = replace(PLAN, parts=LearnedParts(kind=PartsKind.SAISA, path="/parts/saisa", digest="ef" * 32))
    for plan in (PLAN, other):
        assert Plan.load(plan.save(tmp_path / "p.json")) == plan
        assert Plan.from_json(plan.to_json()) == plan
        assert hash(plan) == hash(Plan.from_json(plan.to_json()))


@pytest.mark.parametrize(
    ("file", "parts", "written"),
    [
        ("x.json", "parts", "parts"),
        ("x.json", "a/parts", "a/parts"),
        ("x.json", ".", "."),
        # The plans of a result folder stand in plans/.
        ("plans/x.json", "parts", "../parts"),
        ("plans/x.json", ".", ".."),
        ("other/x.json", "parts", None),
    ],
)
def test_parts_are_named_from_where_the_plan_file_stands(
    file: str, parts: str, written: str | None, tmp_path: Path
) -> None:
    where = str((tmp_path / parts).resolve())
    saved = replace(PLAN, parts=replace(PARTS, path=where)).save(tmp_path / file)
    assert json.loads(saved.read_text())["parts"]["path"] == (written or where)
    found = Plan.load(saved).parts
    assert found is not None and found.path == where
    assert Plan.load(saved).digest == PLAN.digest


def test_the_digest_covers_what_the_parts_do_and_not_where_they_lie() -> None:
    assert replace(PLAN, parts=replace(PARTS, path="/elsewhere")).digest == PLAN.digest
    assert replace(PLAN, parts=replace(PARTS, digest="ef" * 32)).digest != PLAN.digest
    assert replace(PLAN, parts=replace(PARTS, threshold=0.6)).digest != PLAN.digest
    assert replace(PLAN, parts=None).digest != PLAN.digest
    one, same = (replace(PLAN, parts=replace(PARTS, threshold=threshold)) for threshold in (1, 1.0))
    assert one.digest == same.digest and Plan.from_json(one.to_json()) == same


def test_plans_without_parts_keep_the_digests_that_they_had() -> None:
    digest = "9f1a0bedc325"
    assert digest_of(DIGEST, (Mode.FULL, Mode.FREEZE_VISUAL)).startswith(digest)
    assert Plan.load("llava-1.5-7b").digest.startswith("3f422ce8cdc6")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.01}, "the exit threshold is 1.01; give a probability, 0 to 1"),
        ({"threshold": -0.5}, "the exit threshold is -0.5"),
        ({"threshold": None}, "dyvte parts need a threshold"),
        ({"threshold": "0.5"}, "threshold is '0.5', where a number or null is needed"),
        ({"threshold": True}, "threshold is True"),
        ({"kind": "eas"}, "eas parts have no threshold, found 0.5"),
        ({"kind": "vtw"}, "unknown kind of learned parts 'vtw'; the kinds are saisa, dyvte, eas"),
        ({"digest": "short"}, "'short', is no SHA-256 in hex; train them again"),
        ({"digest": "ef" * 32}, "the digest does not match the modes and parts"),
        ({"path": 3}, "path is 3, where text"),
        ({"path": ""}, "names no folder for its learned parts"),
        ({"more": 1}, "an object with kind, path, digest and threshold, or null"),
    ],
)
def test_edited_parts_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = json.loads(PLAN.to_json())
    content["parts"] |= change
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(Refused, match=message) as refusal:
        Plan.load(file)
    assert "\n" not in str(refusal.value)


def test_files_of_before_have_no_parts() -> None:
    content = json.loads(replace(PLAN, parts=None).to_json())
    del content["parts"]
    assert Plan.from_json(json.dumps(content)).parts is None


def test_what_parts_cost_is_not_told_by_modes() -> None:
    arch = architecture(num_layers=4)
    frozen = Plan.of_layers(Mode.FREEZE_VISUAL, range(4), num_layers=4, name="x", model="m", config_digest=DIGEST)
    assert plan_flops_ratio(frozen, arch, 10, 30) == flops_ratio(arch, frozen.modes, 10, 30)
    saisa = replace(frozen, parts=LearnedParts(kind=PartsKind.SAISA, path="/p", digest="ef" * 32))
    assert plan_flops_ratio(saisa, arch, 10, 30) is None
    assert plan_flops_ratio(replace(saisa, flops_ratio=0.4), arch, 10, 30) == 0.4
    counted = replace(saisa, flops_ratio=0.4, source={"projector_weights": 2000})
    wanted = saisa_flops_ratio(arch, frozen.modes, 10, 30, projector_weights=2000)
    assert plan_flops_ratio(counted, arch, 10, 30) == wanted > flops_ratio(arch, frozen.modes, 10, 30)
    assert plan_flops_ratio(replace(PLAN, flops_ratio=0.7), arch, 10, 30) == 0.7
    adapted = replace(
        Plan.of_layers(Mode.SKIP_ATTENTION, (1, 3), num_layers=4, name="x", model="m", config_digest=DIGEST),
        parts=LearnedParts(kind=PartsKind.EAS, path="/p", digest="ef" * 32),
    )
    assert plan_flops_ratio(adapted, arch, 10, 30) is None
    full = 4 * layer_flops(arch, Mode.FULL, 10, 30)
    found = plan_flops_ratio(replace(adapted, source={"adapter_weights": 500}), arch, 10, 30)
    assert found == pytest.approx((plan_flops(arch, adapted.modes, 10, 30) + 2 * 40 * 500) / full)
