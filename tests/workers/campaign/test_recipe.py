"""Recipes: defaults, then the file, then flags; and everything a file can get wrong."""

from pathlib import Path
from typing import Any

import pytest

from shortv.errors import Refused
from shortv.workers.campaign.recipe import Recipe, read_recipe

DEFAULTS = {"models": ["tiny"], "output_path": "out"}
ROOT = Path(__file__).resolve().parents[3]


def read(text: str, tmp_path: Path, flags: dict[str, Any] | None = None, **environment: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return read_recipe(str(file), flags or {}, DEFAULTS, environment=environment)


def test_flags_go_before_the_file_and_that_before_defaults(tmp_path: Path) -> None:
    text = 'models = ["a", "b"]\nlimit = 10\nplans = ["first@2"]\n[gen_kwargs]\nmax_new_tokens = 4\n'
    found = read(text, tmp_path, {"limit": "0.5", "plans": ("last@1,last@2", "x.json"), "revision": None})
    assert found == Recipe(
        models=("a", "b"),
        output_path="out",
        limit=0.5,
        plans=("last@1", "last@2", "x.json"),
        gen_kwargs={"max_new_tokens": 4},
    )


def test_every_setting_has_a_reader_and_a_flag() -> None:
    from dataclasses import fields

    from jobs.campaign import main
    from shortv.workers.campaign.settings import READERS

    names = {field.name for field in fields(Recipe)}
    assert set(READERS) == names
    assert {parameter.name for parameter in main.params} - {"config", "print_submission_id"} == names


def test_flags_read_like_lmms_eval() -> None:
    flags = {"gen_kwargs": "temperature=0,do_sample=False,until=</s>", "replicas": "2:4", "tasks": ("a,b",)}
    found = read_recipe(None, flags, DEFAULTS, environment={})
    assert found.gen_kwargs == {"temperature": 0, "do_sample": False, "until": "</s>"}
    assert (found.replicas, found.tasks) == ((2, 4), ("a", "b"))
    assert found.arguments()["replicas"] == [2, 4]


def test_variables_are_filled_in(tmp_path: Path) -> None:
    text = 'limit = "${LIMIT:-7}"\noutput_path = "${ROOT}/x-${EMPTY:-y}"\nplans = ["${P:-full}"]'
    found = read(text, tmp_path, ROOT="/data", EMPTY="", P="first@1")
    assert (found.limit, found.output_path, found.plans) == (7, "/data/x-y", ("first@1",))
    with pytest.raises(Refused, match="names the environment variable ROOT, which is not set"):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = ['a']", "unknown setting 'task'; did you mean tasks"),
        ("zzz = 1", "unknown setting 'zzz'; the settings are models"),
        ("limit = 'many'", "limit is 'many'; give a number"),
        ("limit = 2.5", "give a number of samples, or a share"),
        ("limit = nan", "give a finite number"),
        ("seed = true", "seed is True; give a whole number"),
        ("seed = -1", "from 0 on"),
        ("batch_size = 0", "from 1 on"),
        ("replicas = '4:2'", "a range from low to high"),
        ("replicas = 'x'", "a number"),
        ("gpus_per_replica = 1.5", "a whole number, or a share"),
        ("dtype = 'int8'", "one of auto, float32"),
        ("trust_remote_code = 1", "true or false"),
        ("fail_on_error = 2", "a share of samples"),
        ("plans = [1]", "a list of texts"),
        ("tasks = []", "has no tasks"),
        ("models = []", "has no models"),
        ("output_path = ''", "give a text"),
        ("gen_kwargs = 'x'", "name=value"),
        ("gen_kwargs = {a = nan}", "finite numbers"),
        ("gen_kwargs = {a = 2026-01-01}", "finite numbers"),
        ("limit = ", "no valid TOML"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(Refused, match=r"recipe none.toml cannot be read: No such file"):
        read_recipe("none.toml", {}, DEFAULTS, environment={})
    with pytest.raises(Refused, match="has no output_path; set it in the recipe, or give --output-path"):
        read_recipe(None, {}, {"models": ["m"]}, environment={})


def test_the_bundled_recipe_is_one() -> None:
    found = read_recipe(str(ROOT / "shortv/tiny/campaign.toml"), {}, {"models": ["m"]}, environment={})
    assert found.output_path == "runs/campaign" and found.limit == 1000
