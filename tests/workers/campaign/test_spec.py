"""A campaign's settings: flags, recipes and defaults, and everything that a file can get wrong."""

from pathlib import Path
from typing import Any

import pytest

from shortv.errors import Refused
from shortv.spec import load_spec
from shortv.workers.campaign.spec import CampaignSpec

DEFAULTS = {"models": ["tiny"], "output_path": "out"}
ROOT = Path(__file__).resolve().parents[3]
HOSTILE = [
    "9" * 401,
    "9" * 5000,
    10**401,
    1e999,
    float("nan"),
    True,
    -1,
    "a\0b",
    "\ud800",
    "x" * 5000,
    [[1]],
    {"a": {}},
]


def read(text: str, tmp_path: Path, flags: dict[str, Any] | None = None, **environment: str) -> CampaignSpec:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return load_spec(CampaignSpec, flags=flags or {}, config=str(file), defaults=DEFAULTS, environment=environment)


def test_flags_go_before_the_file_and_that_before_defaults(tmp_path: Path) -> None:
    text = 'models = ["a", "b"]\nlimit = 10\nplans = ["first@2"]\n[gen_kwargs]\nmax_new_tokens = 4\n'
    found = read(text, tmp_path, {"limit": "0.5", "plans": ("last@1,last@2", "x.json"), "revision": None})
    assert found == CampaignSpec(
        models=("a", "b"),
        output_path="out",
        limit=0.5,
        plans=("last@1", "last@2", "x.json"),
        gen_kwargs={"max_new_tokens": 4},
    )


def test_flags_read_like_lmms_eval() -> None:
    flags = {"gen_kwargs": "temperature=0,do_sample=False,until=</s>", "replicas": "2:4", "tasks": ("a,b",)}
    found = load_spec(CampaignSpec, flags=flags, defaults=DEFAULTS)
    assert found.gen_kwargs == {"temperature": 0, "do_sample": False, "until": "</s>"}
    assert (found.replicas, found.tasks) == ((2, 4), ("a", "b"))
    assert found.arguments()["replicas"] == [2, 4]


def test_variables_are_filled_in(tmp_path: Path) -> None:
    text = 'limit = "${LIMIT:-7}"\noutput_path = "${ROOT}/x-${EMPTY:-y}"\nplans = ["${P:-full}"]'
    found = read(text, tmp_path, ROOT="/data", EMPTY="", P="first@1")
    assert (found.limit, found.output_path, found.plans) == (7, "/data/x-y", ("first@1",))
    with pytest.raises(Refused, match="ROOT"):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task = ['a']", "tasks"),
        ("zzz = 1", "models"),
        ("limit = 'many'", "limit"),
        ("limit = 2.5", "limit"),
        ("limit = nan", "nan"),
        ("seed = -1", "seed"),
        ("batch_size = 0", "batch_size"),
        ("replicas = '4:2'", "replicas"),
        ("gpus_per_replica = true", "gpus_per_replica"),
        ("dtype = 'int8'", "dtype"),
        ("trust_remote_code = 7", "trust_remote_code"),
        ("fail_on_error = 2", "fail_on_error"),
        ("plans = [1]", "plans"),
        ("tasks = []", "tasks"),
        ("models = []", "models"),
        ("output_path = ''", "output_path"),
        ("gen_kwargs = 'x'", "gen_kwargs"),
        ("gen_kwargs = {a = 2026-01-01}", "gen_kwargs"),
        ("limit = ", "TOML"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path, text: str, name: str) -> None:
    with pytest.raises(Refused, match=name):
        read(text, tmp_path)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", CampaignSpec.model_fields)
def test_no_value_of_any_setting_gives_a_traceback(name: str, value: object) -> None:
    try:
        load_spec(CampaignSpec, flags={**DEFAULTS, name: value})
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 600


def test_the_bundled_recipe_is_one() -> None:
    config = str(ROOT / "shortv/tiny/campaign.toml")
    found = load_spec(CampaignSpec, flags={}, config=config, defaults={"models": ["m"]}, environment={})
    assert found.output_path == "runs/campaign" and found.limit == 1000
