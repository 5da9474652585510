"""Plans: what they accept, what they refuse, and that a file gives back what was saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv.errors import Refused, ShortVError
from shortv.plan import LearnedParts, Mode, PartsKind, Plan, digest_of, modes_of_ablation, published_plans

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
PARTS = LearnedParts(kind=PartsKind.DYVTE, path="/parts/dyvte", digest="cd" * 32, threshold=0.5)
LEARNED = Plan.full(num_layers=4, name="dyvte", model="org/model", config_digest=DIGEST, parts=PARTS)


NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)
NAMED = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)
SHA_256 = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
LEAF = NUMBER | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
SOURCE = st.none() | st.dictionaries(st.text(), LEAF | st.lists(LEAF))
EXITS = st.builds(
    LearnedParts,
    kind=st.just(PartsKind.DYVTE),
    path=st.just("/parts/dyvte"),
    digest=SHA_256,
    threshold=st.floats(0, 1),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    modes = tuple(draw(st.lists(st.sampled_from(Mode), min_size=1, max_size=40)))
    ranking = draw(st.permutations(range(len(modes))))
    return Plan(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        model=draw(NAMED),
        revision=draw(st.none() | NAMED),
        config_digest=draw(SHA_256),
        num_layers=len(modes),
        modes=modes,
        ranking=tuple(ranking[: draw(st.integers(0, len(modes)))]),
        source=draw(SOURCE),
        flops_ratio=draw(NUMBER),
        flops_t=draw(NUMBER),
        flops_v=draw(NUMBER),
        parts=draw(st.none() | EXITS),
    )


@given(plan=plans())
def test_a_file_gives_back_what_was_saved(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("plan")
    assert Plan.load(plan.save(folder / "p.json")) == plan
    assert len({plan, Plan.from_json(plan.to_json())}) == 1
    assert json.loads(plan.to_json())["digest"] == plan.digest


def test_only_a_plan_that_downsamples_has_the_key() -> None:
    smaller = replace(LEARNED, parts=None, downsample=0.5)
    assert json.loads(smaller.to_json())["downsample"] == Plan.from_json(smaller.to_json()).downsample == 0.5
    assert "downsample" not in json.loads(LEARNED.to_json())
    with pytest.raises(Refused, match="without parts"):
        replace(LEARNED, downsample=0.5)


def test_a_folder_is_made_for_a_plan_and_holds_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model-1.5"
    assert PLAN.save(folder) == folder / "shortv_plan.json"
    assert Plan.load(folder) == PLAN
    assert [file.name for file in folder.iterdir()] == ["shortv_plan.json"]
    (tmp_path / "taken" / "shortv_plan.json").mkdir(parents=True)
    for path in (tmp_path / "taken", folder / "shortv_plan.json" / "p.json"):
        with pytest.raises(ShortVError, match="cannot write plan file"):
            PLAN.save(path)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["shortv_plan.json"]


def test_the_digest_covers_configuration_modes_and_what_the_parts_do() -> None:
    same = [
        replace(PLAN, name="x", model="y", revision=None, ranking=(), source=None, flops_t=1),
        replace(LEARNED, parts=replace(PARTS, path="/elsewhere")),
    ]
    assert [plan.digest for plan in same] == [PLAN.digest, LEARNED.digest]
    others = [
        replace(PLAN, config_digest="cd" * 32),
        replace(PLAN, modes=(*PLAN.modes[:3], Mode.DROP_VISUAL)),
        replace(LEARNED, parts=None),
        replace(LEARNED, parts=replace(PARTS, digest="ef" * 32)),
        replace(LEARNED, parts=replace(PARTS, threshold=0.6)),
    ]
    others += [replace(others[2], downsample=share) for share in (0.4, 0.5)]
    assert len({PLAN.digest, LEARNED.digest, *(plan.digest for plan in others)}) == 9
    one = replace(LEARNED, parts=replace(PARTS, threshold=1))
    assert one.digest == replace(LEARNED, parts=replace(PARTS, threshold=1.0)).digest
    assert digest_of(DIGEST, (Mode.FULL, Mode.FREEZE_VISUAL)).startswith("9f1a0bedc325")  # as it always was


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 2}, "schema 2"),
        ({"modes": ["full", "freeze", "full", "full"]}, "'freeze'"),
        ({"modes": ["full"] * 4}, f"{PLAN.digest}.*[0-9a-f]{{64}}"),
        ({"modes": [], "num_layers": 0}, "at least one layer"),
        ({"modes": "full"}, "modes is 'full'"),
        ({"config_digest": "cd" * 32}, PLAN.digest),
        ({"config_digest": "short"}, "'short'"),
        ({"num_layers": 4.0}, "num_layers is 4.0"),
        ({"ranking": [1, 3, 1]}, "layer 1"),
        ({"ranking": [True]}, "ranking.0 is True"),
        ({"name": "../up"}, r"'\.\./up'"),
        ({"name": "x" * 10_000 + "/"}, "xxx"),
        ({"model": "a\0b"}, r"a\\x00b"),
        ({"model": "\ud800"}, r"\\ud800"),
        ({"layers": [1]}, "'layers'"),
        ({"parts": {"threshold": 1.01}}, "1.01"),
        ({"parts": {"threshold": None}}, "dyvte.*None"),
        ({"parts": {"threshold": True}}, "parts.threshold is True"),
        ({"parts": {"kind": "eas"}}, "eas.*0.5"),
        ({"parts": {"digest": "ef" * 32}}, LEARNED.digest),
        ({"parts": {"path": "a\0b"}}, r"a\\x00b"),
        ({"parts": {"more": 1}}, "parts.more"),
        ({"downsample": 0.5}, "runs the full model"),
        ({"downsample": 1.0}, "downsample is 1"),
        ({"downsample": "0.5"}, "downsample is '0.5'"),
    ],
)
def test_edited_files_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    content = json.loads((LEARNED if "parts" in change else PLAN).to_json())
    content |= {"parts": content["parts"] | change["parts"]} if "parts" in change else change
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(Refused, match=named) as refusal:
        Plan.load(file)
    message = str(refusal.value)
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", "list"),
        (PLAN.to_json().replace('"schema": 1', '"schema": 1, "schema": 1'), "'schema'"),
        (PLAN.to_json().replace('"schema": 1,', ""), "schema is None"),
        (PLAN.to_json().replace("0.625", "NaN"), "NaN"),
        (PLAN.to_json().replace("40", "9" * 401), "64 bits"),
        (PLAN.to_json().replace('"digest"', '"digets"'), "'digets'"),
        ('{"schema": 1}', "'name'"),
        (" " * (1 << 20) + PLAN.to_json(), "longer than"),
    ],
)
def test_broken_files_are_refused(text: str, named: str) -> None:
    with pytest.raises(Refused, match=named) as refusal:
        Plan.from_json(text)
    assert len(str(refusal.value)) < 600


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"No such file.*llava-1\.5-7b"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(Refused, match=r"shortv_plan\.json"):
        Plan.load(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("a\0b", "x" * 5_000, str(tmp_path / "loop"), "/dev/zero"):
        with pytest.raises(Refused) as refusal:
            Plan.load(path)
        assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000


def test_lists_of_layers() -> None:
    rest: dict[str, Any] = {"num_layers": 4, "name": "x", "model": "m", "config_digest": DIGEST}
    with pytest.raises(Refused, match="layer 2"):
        Plan.of_layers(Mode.FREEZE_VISUAL, [2, 1, 2], **rest)
    with pytest.raises(Refused, match="layer -1"):
        Plan.of_layers(Mode.FREEZE_VISUAL, [-1], **rest)
    for source in ({"layer": {1, 2}}, {"layer": float("inf")}, {"seed": 2**64}, {"text": "\ud800"}):
        with pytest.raises(Refused, match="source"):
            Plan.of_layers(Mode.FREEZE_VISUAL, [1], source=source, **rest)


def test_plans_fit_their_architecture_and_warn_of_the_rest() -> None:
    fits: dict[str, Any] = {"config_digest": DIGEST, "num_layers": 4, "model": "org/model", "revision": "main"}
    assert PLAN.check_fits(**fits) == []
    assert "other" in PLAN.check_fits(**fits | {"revision": "other"})[0]
    assert "unknown" in PLAN.check_fits(**fits | {"revision": None})[0]
    assert "copy" in PLAN.check_fits(**fits | {"model": "copy"})[0]
    with pytest.raises(Refused, match=f"{DIGEST}.*{'cd' * 32}"):
        PLAN.check_fits(**fits | {"config_digest": "cd" * 32})
    # Names in a plan never reach the terminal as they are.
    forged = replace(PLAN, model="m\x1b[2J\nError: forged", revision="\x1b[0m\n")
    assert all(warning.isprintable() for warning in forged.check_fits(**fits))
    with pytest.raises(Refused, match=r"4 layers.*has 5") as refusal:
        forged.check_fits(**fits | {"num_layers": 5})
    assert str(refusal.value).isprintable()


def test_modes_of_ablations() -> None:
    assert modes_of_ablation(Mode.FREEZE_TEXT, 1, 3) == (Mode.FULL, Mode.FREEZE_TEXT, Mode.FULL)
    assert modes_of_ablation(Mode.DROP_VISUAL, 1, 3) == (Mode.FULL, Mode.DROP_VISUAL, Mode.DROP_VISUAL)
    with pytest.raises(Refused, match="layer 3 does not exist"):
        modes_of_ablation(Mode.DROP_VISUAL, 3, 3)


PUBLISHED = {
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "3f422ce8cdc6", 19, 0.55199, 576),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "3795b15f5836", 24, 0.54745, 576),
    "llava-next-7b": ("llava-hf/llava-v1.6-vicuna-7b-hf", "af3a2b7f1211", 19, 0.50521, 2880),
    "llava-next-13b": ("llava-hf/llava-v1.6-vicuna-13b-hf", "ff637128e9e4", 24, 0.50164, 2880),
}


def test_published_plans() -> None:
    """Digests cover architecture and modes."""
    assert set(published_plans()) == set(PUBLISHED)
    for name, (model, digest, frozen, ratio, visual) in PUBLISHED.items():
        plan = Plan.load(name)
        assert (plan.model, plan.digest[:12], len(plan.ranking)) == (model, digest, frozen)
        assert (plan.flops_ratio, plan.flops_t, plan.flops_v) == (pytest.approx(ratio, abs=5.1e-6), 64, visual)
        assert set(plan.layers(Mode.FREEZE_VISUAL)) == set(plan.ranking)
        assert len(plan.layers(Mode.FULL)) == plan.num_layers - frozen
    assert Plan.load("llava-1.5-7b").ranking[:5] == (31, 29, 30, 28, 0)


def test_a_file_goes_before_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "llava-1.5-7b")
    assert Plan.load("llava-1.5-7b") == PLAN


@pytest.mark.parametrize(
    ("file", "parts", "written"),
    [
        ("x.json", "a/parts", "a/parts"),
        ("x.json", ".", "."),
        # The plans of a result folder stand in plans/.
        ("plans/x.json", "parts", "../parts"),
        ("other/x.json", "parts", None),
    ],
)
def test_parts_are_named_from_where_the_plan_file_stands(
    file: str, parts: str, written: str | None, tmp_path: Path
) -> None:
    where = str((tmp_path / parts).resolve())
    saved = replace(LEARNED, parts=replace(PARTS, path=where)).save(tmp_path / file)
    assert json.loads(saved.read_text())["parts"]["path"] == (written or where)
    found = Plan.load(saved).parts
    assert found is not None and found.path == where
    assert Plan.load(saved).digest == LEARNED.digest


def test_parts_behind_a_loop_of_links_leave_the_plan_readable(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "p.json").write_text(replace(LEARNED, parts=replace(PARTS, path="loop/parts")).to_json())
    assert Plan.load(tmp_path / "p.json").digest == LEARNED.digest


def test_files_of_before_have_no_parts() -> None:
    content = json.loads(PLAN.to_json())
    del content["parts"]
    assert Plan.from_json(json.dumps(content)).parts is None
