"""What the page of a campaign says of kinds of plans, learned parts, exit layers, and answers that are not there."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from reports.manifest import CampaignManifest
from reports.page import build_page, document
from reports.page.campaign_data import KINDS, kind_of_plan, parts_of_plan, read_campaign_data
from reports.page.document import Chart, Grid, Page, render
from shortv.plan import PartsKind
from tests.reports.page.campaigns import make_judged
from tests.reports.runs import change_manifest, cut, keep_answers

FULL, LC_2, DYVTE = "0" * 64, "1" * 64, "a" * 64
PAGE = Path(document.__file__).parent
MIXED = ["full", "freeze-visual", "full"]


def charts_of(page: Page) -> dict[str, Chart]:
    return {chart.key: chart for section in page.sections for chart in section.charts}


def grid_of(page: Page, caption: str) -> Grid:
    return next(grid for section in page.sections for grid in section.grids if grid.caption == caption)


def test_a_whole_campaign_warns_of_nothing_and_names_its_parts_and_intervals(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path))
    links = re.findall(r'<a href="([^"#]+)"', render(page).decode())
    parts = ["answers/part-000000.parquet", "answers/part-000001.parquet"]
    assert set(parts) <= set(links)
    assert [link for link in links if not (tmp_path / link).is_file()] == []
    charts, plans = charts_of(page), grid_of(page, "Plans")
    assert charts["exits-0"].numbers.files == parts
    assert page.warnings == [] and "cut to the range 0 to 1" in charts["accuracy-0"].note
    assert {row["plan"] for row in charts["plans-0"].data["rows"]} == {
        *("full", "lc-2", "random0-2", "first-2"),
        "dyvte-0.5 (DyVTE at 0.5)",
    }
    named = {row[1]: row[list(plans.columns).index("learned parts")] for row in plans.rows}
    assert named == dict.fromkeys(("full", "lc-2", "random0-2", "first-2")) | {"dyvte-0.5": "DyVTE at 0.5"}


@pytest.mark.parametrize(("left", "said"), [(0, "are missing"), (49, "have fewer samples than their cells")])
def test_answers_that_are_not_there_are_named_at_the_top(left: int, said: str, tmp_path: Path) -> None:
    folder = make_judged(tmp_path, failed=3)
    # A cell that gave no result has no answers to miss.
    rows = folder.read_table("cells").to_pylist()
    folder.write_table("cells", [row | ({"n": 0} if row["plan"] == "full" else {}) for row in rows])
    lacking = (LC_2, DYVTE)
    keep_answers(folder, lambda row: row["cell"] not in (*lacking, FULL) or (row["doc"] > 0 and left > 0))
    page = build_page(folder)
    assert len(page.warnings) == 2 and page.warnings[0].startswith("This run is partial")
    assert page.warnings[1].startswith(f"The answers of 2 cells {said}: lc-2 on shapes, dyvte-0.5 on shapes.")
    # What the table of cells knows of the errors still stands.
    assert [row[1] for row in grid_of(page, "Errors by reason").rows] == ([2] if left else [3])


def test_a_part_that_cannot_be_read_is_named_and_the_rest_is_on_the_page(tmp_path: Path) -> None:
    folder = make_judged(tmp_path, failed=3)
    cut(tmp_path / "answers/part-000001.parquet")
    page = build_page(folder)
    assert "A part of the answers cannot be read" in page.warnings[1] and "part-000001" in page.warnings[1]
    assert page.warnings[2].startswith("The answers of 5 cells have fewer samples than their cells: ")
    exits = charts_of(page)["exits-0"]
    assert {row["samples"] for row in exits.data["rows"] if row["kind"] == "all"} == {32}
    assert grid_of(page, "Errors by reason").rows == [["the prompt is too long", 3]]


def test_an_answer_that_was_repeated_counts_once(tmp_path: Path) -> None:
    folder = make_judged(tmp_path, failed=3)
    rows = [row | {"error": None} for row in folder.read_tables("answers").to_pylist() if row["error"]]
    folder.write_table("answers/part-000002", rows[:2])
    answered = read_campaign_data(folder).answered
    assert answered.problems == [] and answered.samples == 250
    assert [row["samples"] for row in answered.failures] == [1]


def test_a_campaign_that_runs_says_how_many_answers_there_are(tmp_path: Path) -> None:
    folder = make_judged(tmp_path)
    for name in ("answers/part-000001", "cells", "metrics", "comparisons", "speed"):
        folder.delete(f"{name}.parquet")
    change_manifest(tmp_path, state="running", counts={}, finished=None)
    page = build_page(folder)
    assert dict(page.headline)["answers so far"] == 5 * 32
    assert len(page.warnings) == 2 and "is not finished" in page.warnings[0]
    assert page.warnings[1] == "No cell has finished yet."


def test_answers_of_a_larger_recipe_do_not_count(tmp_path: Path) -> None:
    folder = make_judged(tmp_path, failed=3)
    cells = folder.read_table("cells").to_pylist()
    folder.write_table("cells", [cell | {"n": 2, "errors": min(cell["errors"], 2)} for cell in cells])
    change_manifest(tmp_path, tasks=[dict(CampaignManifest.load(folder).tasks[0]) | {"num_docs": 2}])
    answered = read_campaign_data(folder).answered
    assert answered.samples == 10 and answered.problems == []
    assert [row["samples"] for row in answered.failures] == [2]


def test_no_damage_to_answers_is_a_traceback(tmp_path: Path) -> None:
    folder, chance = make_judged(tmp_path, failed=3), random.Random(0)
    name = "answers/part-000000.parquet"
    whole = folder.read_bytes(name)
    for _ in range(10):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        folder.write_bytes(name, bytes(changed))
        assert read_campaign_data(folder).manifest.state == "partial"


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ({"kind": "full", "modes": ["full"] * 3}, "full model"),
        ({"kind": "random", "modes": MIXED}, "random control"),
        ({"kind": "downsample", "modes": ["full"] * 3}, "smaller images"),
        ({"kind": "plan", "modes": MIXED, "source": {"order": "lc"}}, "LC plan"),
        ({"kind": "plan", "modes": MIXED, "source": {"order": "last"}}, "last-layers control"),
        ({"kind": "plan", "modes": MIXED}, "other plan"),
        ({"kind": "plan", "modes": ["no-visual-ffn"] * 3, "source": {"order": "fixed"}}, "one mode in all layers"),
        ({"kind": "plan", "modes": ["full", "drop-visual", "drop-visual"]}, "exit at a fixed layer"),
        ({"kind": "plan", "modes": ["drop-visual"] * 3}, "exit at a fixed layer"),
        ({"kind": "plan", "modes": ["freeze-visual", "drop-visual"]}, "other plan"),
        ({"kind": "plan", "modes": ["full"] * 3, "parts": {"kind": "eas"}, "source": {"order": "lc"}}, "EAS"),
        ({"kind": "plan", "modes": ["full"] * 3, "parts": {"kind": ["unknown"]}}, "other plan"),
    ],
)
def test_what_a_plan_is(plan: dict[str, Any], kind: str) -> None:
    assert kind_of_plan(plan) == kind


def test_every_learned_system_has_a_kind_and_a_name() -> None:
    assert {kind_of_plan({"kind": "plan", "parts": {"kind": str(kind)}}) for kind in PartsKind} == set(KINDS[8:11])
    assert parts_of_plan({"parts": {"kind": "dyvte", "threshold": 0.99}}) == "DyVTE at 0.99"
    assert parts_of_plan({"parts": {"kind": "eas", "threshold": None}}) == "EAS"


def luminance(colour: str) -> float:
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_kinds_stand_out_from_the_ground(scheme: str) -> None:
    own = re.search(r"const KINDS = \{.*?\};", (PAGE / "page.js").read_text("utf-8"), re.S)
    assert own
    colours = json.loads(re.search(rf"{scheme}: (\[.*?\])", own[0], re.S)[1])  # type: ignore[index]
    grounds = re.findall(r"--ground: (#\w{6})", (PAGE / "page.css").read_text("utf-8"))
    ground = luminance(grounds[("light", "dark").index(scheme)])
    assert len(set(colours)) == len(KINDS)
    for colour in colours:
        high, low = sorted((luminance(colour), ground), reverse=True)
        # WCAG 2.2, 1.4.11: what is needed to understand a graphic.
        assert (high + 0.05) / (low + 0.05) >= 3, colour
