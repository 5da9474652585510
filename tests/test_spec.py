"""Settings mean the same from flags, files and `key=value`, and bad ones are refused by name in one line."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from shortv.errors import Refused
from shortv.spec import Count, Gpus, Limit, LoadingSpec, Seed, Share, Texts, WorkerRange, Workers, load_spec


class Example(LoadingSpec):
    output_path: str
    tasks: Texts = ("a",)
    limit: Limit | None = None
    batch_size: Count = 8
    gpus: Gpus = 1
    seed: Seed = 0
    share: Share = 0.0
    workers: Workers | None = None
    options: dict[str, Any] = Field(default_factory=dict)


HOSTILE: list[object] = [
    "9" * 401,
    "9" * 5000,
    float("nan"),
    float("inf"),
    10**401,
    True,
    "a\0b",
    "\ud800",
    "x" * 5000,
    -1,
    "1e30",
    {"a": "\0"},
    ["a", "b\0"],
]


def recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.toml").write_text(text)
    return str(tmp_path / "recipe.toml")


def test_flags_go_before_the_file_and_that_before_defaults(tmp_path: Path) -> None:
    config = recipe(tmp_path, 'limit = "${N:-5}"\nbatch_size = 4\ntasks = ["x,y", "x"]\nworkers = "2:3"')
    found = load_spec(
        Example,
        flags={"output_path": "o", "batch_size": "2", "limit": None, "tasks": ()},
        config=config,
        defaults={"limit": 9, "gpus": 2},
        environment={},
    )
    assert (found.batch_size, found.limit, found.gpus, found.tasks) == (2, 5, 2, ("x", "y"))
    assert found.workers == WorkerRange(2, 3)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("batchsize = 3", "batch_size"),
        ("limit = 1.5", "limit"),
        ("gpus = 1.5", "gpus"),
        ("gpus = true", "gpus"),
        ("workers = '3:2'", "workers"),
        ("limit = '${MISSING}'", "MISSING"),
        ("share = 1.01", "share"),
        ("dtype = 'int8'", "dtype"),
    ],
)
def test_bad_settings_are_refused_by_name(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=part):
        load_spec(Example, flags={"output_path": "o"}, config=recipe(tmp_path, text), environment={})


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(Refused, match="--output-path"):
        load_spec(Example, flags={})


@pytest.mark.parametrize("name", Example.model_fields)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_hostile_values_are_taken_or_refused_in_one_short_line(name: str, value: object) -> None:
    try:
        load_spec(Example, flags={"output_path": "o", name: value})
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 500
