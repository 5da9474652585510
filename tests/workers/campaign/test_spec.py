"""A campaign's settings: what its own fields accept, and what the bundled recipes hold."""

import re
from pathlib import Path

import pytest

from shortv.errors import Refused
from shortv.spec import load_spec
from shortv.workers.campaign.spec import CampaignSpec
from tests.test_spec import HOSTILE

DEFAULTS = {"models": ["tiny"], "output_path": "out"}
TINY = Path(__file__).resolve().parents[3] / "shortv" / "tiny"


def test_flags_have_the_form_of_lmms_eval_and_a_recipe_has_tables(tmp_path: Path) -> None:
    flags = {"gen_kwargs": "temperature=0,do_sample=False,until=</s>", "replicas": "2:4", "tasks": ("a,b",)}
    found = load_spec(CampaignSpec, flags=flags, defaults=DEFAULTS)
    assert found.gen_kwargs == {"temperature": 0, "do_sample": False, "until": "</s>"}
    assert (found.replicas, found.tasks) == ((2, 4), ("a", "b"))
    assert found.arguments()["replicas"] == [2, 4]
    file = tmp_path / "recipe.toml"
    file.write_text('limit = 10\nplans = ["${P}", "last@1"]\n[gen_kwargs]\nmax_new_tokens = 4\n')
    found = load_spec(CampaignSpec, flags={}, config=str(file), defaults=DEFAULTS, environment={"P": "first@1"})
    assert (found.limit, found.plans, found.gen_kwargs) == (10, ("first@1", "last@1"), {"max_new_tokens": 4})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task = ['a']", "tasks"),
        ("tasks = []", "tasks"),
        ("models = []", "models"),
        ("output_path = ''", "output_path"),
        ("limit = 2.5", "limit"),
        ("trust_remote_code = 7", "trust_remote_code"),
        ("plans = [1]", "plans"),
        ("gen_kwargs = 'x'", "gen_kwargs"),
        ("gen_kwargs = {a = 2026-01-01}", "gen_kwargs"),
        ("limit = ", "TOML"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_by_name(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(Refused, match=name):
        load_spec(CampaignSpec, flags={}, config=str(tmp_path / "recipe.toml"), defaults=DEFAULTS)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", CampaignSpec.model_fields)
def test_no_value_of_any_setting_gives_a_traceback(name: str, value: object) -> None:
    try:
        load_spec(CampaignSpec, flags={**DEFAULTS, name: value})
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 600


@pytest.mark.parametrize(("name", "output"), [("campaign", "runs/campaign"), ("seeds", "runs/campaign-seeds")])
def test_the_bundled_recipes_are_valid(name: str, output: str) -> None:
    found = load_spec(CampaignSpec, flags={}, config=str(TINY / f"{name}.toml"), defaults={"models": ["m"]})
    assert found.output_path == output and found.limit == 1000


def test_the_documentation_lists_every_setting() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `--", (TINY.parents[1] / "docs/campaigns.md").read_text(), re.MULTILINE)
    assert listed == list(CampaignSpec.model_fields)
