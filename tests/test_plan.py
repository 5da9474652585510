"""Plans: what they accept, what they refuse, and that a file gives back what was saved."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv.errors import Refused, ShortVError
from shortv.plan import Mode, Plan, modes_of_ablation
from shortv.planfile import published_plans
from tests.architectures import architecture

DIGEST = "ab" * 32
PLAN = Plan.of_layers(
    Mode.FREEZE_VISUAL,
    [3, 1],
    num_layers=4,
    name="freeze-visual-2",
    model="org/model",
    revision="main",
    config_digest=DIGEST,
    ranking=(3, 1, 0, 2),
    source={"samples": 40, "kl_direction": "full-ablated"},
    flops_ratio=0.625,
    flops_t=64,
    flops_v=576,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    modes = tuple(draw(st.lists(st.sampled_from(Mode), min_size=1, max_size=40)))
    ranking = draw(st.permutations(range(len(modes))))
    number = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    leaf = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
    return Plan(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        model=draw(st.text(min_size=1)),
        revision=draw(st.none() | st.text()),
        config_digest=draw(st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
        num_layers=len(modes),
        modes=modes,
        ranking=tuple(ranking[: draw(st.integers(0, len(modes)))]),
        source=draw(st.none() | st.dictionaries(st.text(), leaf | st.lists(leaf))),
        flops_ratio=draw(number),
        flops_t=draw(number),
        flops_v=draw(number),
    )


@given(plan=plans())
def test_a_file_gives_back_what_was_saved(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("plan")
    assert Plan.load(plan.save(folder / "p.json")) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["digest"] == plan.digest


def test_folders_hold_one_plan(tmp_path: Path) -> None:
    assert PLAN.save(tmp_path) == tmp_path / "shortv_plan.json"
    assert Plan.load(tmp_path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["shortv_plan.json"]


def test_a_folder_is_made_for_a_plan(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model-1.5"
    assert PLAN.save(folder) == folder / "shortv_plan.json"
    assert Plan.load(folder) == PLAN


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ShortVError, match="cannot write plan file"):
        PLAN.save(tmp_path / "file" / "p.json")
    (tmp_path / "folder" / "shortv_plan.json").mkdir(parents=True)
    with pytest.raises(ShortVError, match="cannot write plan file"):
        PLAN.save(tmp_path / "folder")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["shortv_plan.json"]


def test_digest_covers_configuration_and_modes_only() -> None:
    content = json.loads(PLAN.to_json())
    del content["digest"]
    content["modes"] = tuple(Mode(mode) for mode in content["modes"])
    content["ranking"] = tuple(content["ranking"])
    renamed = Plan(
        **content | {"name": "x", "model": "y", "revision": None, "ranking": (), "source": None, "flops_t": 1}
    )
    assert renamed.digest == PLAN.digest
    assert Plan(**content | {"config_digest": "cd" * 32}).digest != PLAN.digest
    assert Plan(**content | {"modes": (*PLAN.modes[:3], Mode.DROP_VISUAL)}).digest != PLAN.digest


def test_full_is_an_ordinary_plan() -> None:
    plan = Plan.full(num_layers=3, model="m", config_digest=DIGEST)
    assert plan.modes == (Mode.FULL,) * 3
    assert (plan.name, plan.layers(Mode.FULL), plan.layers(Mode.DROP_VISUAL)) == ("full", (0, 1, 2), ())
    assert PLAN.layers(Mode.FREEZE_VISUAL) == (1, 3)


def test_plans_hash_and_keep_their_source() -> None:
    assert len({PLAN, Plan.from_json(PLAN.to_json())}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2, this version reads 1"),
        ({"schema": True}, "schema is True"),
        ({"modes": ["full", "freeze", "full", "full"]}, "unknown mode 'freeze'; the modes are full, freeze-visual"),
        ({"modes": ["full"] * 4}, "digest does not match the modes"),
        ({"modes": ["full"] * 3}, "4 layers but lists 3 modes"),
        ({"modes": [], "num_layers": 0}, "at least one layer"),
        ({"modes": "full"}, "modes is 'full', where a list"),
        ({"modes": [1, 2, 3, 4]}, "modes is 1, where text"),
        ({"config_digest": "cd" * 32}, "digest does not match"),
        ({"config_digest": "short"}, "no SHA-256"),
        ({"digest": None}, "digest does not match"),
        ({"num_layers": 4.0}, "num_layers is 4.0, where a whole number"),
        ({"ranking": [1, 3, 1]}, "layer 1 is listed twice"),
        ({"ranking": [4]}, "layer 4 does not exist: the model has 4 layers"),
        ({"ranking": [True]}, "ranking is True"),
        ({"source": []}, r"source is \[\], where an object"),
        ({"flops_ratio": "0.5"}, "flops_ratio is '0.5'"),
        ({"name": "../up"}, "cannot be part of a file name"),
        ({"name": None}, "name is None, where text"),
        ({"model": ""}, "names no model"),
        ({"layers": [1]}, "unknown key 'layers'"),
    ],
)
def test_edited_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(json.loads(PLAN.to_json()) | change))
    with pytest.raises(Refused, match=message) as refusal:
        Plan.load(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        (PLAN.to_json()[:200], "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "JSON list, not an object"),
        (PLAN.to_json().replace('"schema": 1', '"schema": 1, "schema": 1'), "'schema' stands twice"),
        (PLAN.to_json().replace("0.625", "NaN"), "NaN, which is no number"),
        (PLAN.to_json().replace('"digest"', '"digets"'), "unknown key 'digets'"),
        ('{"schema": 1}', "'config_digest' is missing"),
    ],
)
def test_broken_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Plan.from_json(text)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"No such file.*llava-1\.5-7b"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(Refused, match=r"shortv_plan\.json"):
        Plan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not UTF-8"):
        Plan.load(tmp_path / "binary")


def test_lists_of_layers() -> None:
    rest: dict[str, Any] = {"num_layers": 4, "name": "x", "model": "m", "config_digest": DIGEST}
    with pytest.raises(Refused, match="layer 2 is listed twice; list each layer once"):
        Plan.of_layers(Mode.FREEZE_VISUAL, [2, 1, 2], **rest)
    with pytest.raises(Refused, match="layer -1 does not exist"):
        Plan.of_layers(Mode.FREEZE_VISUAL, [-1], **rest)
    with pytest.raises(Refused, match="cannot be written as JSON"):
        Plan.of_layers(Mode.FREEZE_VISUAL, [1], source={"layer": {1, 2}}, **rest)


def test_plans_fit_their_architecture_and_warn_of_the_rest() -> None:
    fits: dict[str, Any] = {"config_digest": DIGEST, "num_layers": 4, "model": "org/model", "revision": "main"}
    assert PLAN.check_fits(**fits) == []
    assert "revision main, the model's is other" in PLAN.check_fits(**fits | {"revision": "other"})[0]
    assert "the model's is unknown" in PLAN.check_fits(**fits | {"revision": None})[0]
    assert "made for org/model, not copy" in PLAN.check_fits(**fits | {"model": "copy"})[0]
    with pytest.raises(Refused, match=r"made for org/model with 4 layers, but org/model has 5; make a plan"):
        PLAN.check_fits(**fits | {"num_layers": 5})
    with pytest.raises(Refused, match=r"architecture abababababab\), but org/model has architecture cdcd"):
        PLAN.check_fits(**fits | {"config_digest": "cd" * 32})


def test_modes_of_ablations() -> None:
    assert modes_of_ablation(Mode.FREEZE_TEXT, 1, 3) == (Mode.FULL, Mode.FREEZE_TEXT, Mode.FULL)
    assert modes_of_ablation(Mode.DROP_VISUAL, 1, 3) == (Mode.FULL, Mode.DROP_VISUAL, Mode.DROP_VISUAL)
    with pytest.raises(Refused, match="layer 3 does not exist"):
        modes_of_ablation(Mode.DROP_VISUAL, 3, 3)


PUBLISHED = {
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "llava", 32, 4096, 11008, {1, *range(4, 12), *range(13, 17)}, 0.55199),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "llava", 40, 5120, 13824, {*range(3, 17), 18, 19}, 0.54745),
    "llava-next-7b": (
        "llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", 32, 4096, 11008, {1, *range(3, 12), 13, 14, 16}, 0.50521,
    ),
    "llava-next-13b": (
        "llava-hf/llava-v1.6-vicuna-13b-hf", "llava_next", 40, 5120, 13824, {0, *range(3, 17), 19}, 0.50164,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_plans(name: str) -> None:
    model, model_type, num_layers, hidden, intermediate, dense, ratio = PUBLISHED[name]
    heads = hidden // 128
    arch = architecture(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
    )
    plan = Plan.load(name)
    warnings = plan.check_fits(config_digest=arch.config_digest, num_layers=num_layers, model=model, revision="main")
    assert len(warnings) == 1
    assert set(plan.layers(Mode.FULL)) == dense
    assert set(plan.layers(Mode.FREEZE_VISUAL)) == set(plan.ranking)
    assert len(plan.ranking) == {32: 19, 40: 24}[num_layers]
    assert plan.flops_ratio == pytest.approx(ratio, abs=5.1e-6)
    assert (plan.flops_t, plan.flops_v) == (64, 2880 if "next" in name else 576)


def test_published_plans_are_all_listed() -> None:
    assert set(published_plans()) == set(PUBLISHED)
    assert Plan.load("llava-1.5-7b").ranking[:5] == (31, 29, 30, 28, 0)


def test_a_file_goes_before_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "llava-1.5-7b")
    assert Plan.load("llava-1.5-7b") == PLAN
