"""What the page of a campaign says of kinds of plans, learned parts, exit layers, and answers that are not there."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reports.page import build_page, document
from reports.page.campaign_data import KINDS, kind_of_plan, parts_of_plan, read_campaign_data
from reports.page.document import Chart, Grid, Page, render
from reports.store import Folder
from shortv.plan import PartsKind
from tests.reports.page.campaigns import make_judged

LC_2, DYVTE = "1" * 64, "a" * 64
PAGE = Path(document.__file__).parent
MIXED = ["full", "freeze-visual", "full"]


def charts_of(page: Page) -> dict[str, Chart]:
    return {chart.key: chart for section in page.sections for chart in section.charts}


def grid_of(page: Page, caption: str) -> Grid:
    return next(grid for section in page.sections for grid in section.grids if grid.caption == caption)


def test_a_whole_campaign_warns_of_nothing_and_names_its_parts_and_intervals(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path))
    links = re.findall(r'<a href="([^"#]+)"', render(page).decode())
    assert f"answers/{DYVTE}.parquet" in links
    assert [link for link in links if not (tmp_path / link).is_file()] == []
    charts, plans = charts_of(page), grid_of(page, "Plans")
    assert charts["exits-0"].numbers.files == [f"answers/{DYVTE}.parquet"]
    assert page.warnings == [] and "cut to the range 0 to 1" in charts["accuracy-0"].note
    assert {row["plan"] for row in charts["plans-0"].data["rows"]} == {
        *("full", "lc-2", "random0-2", "first-2"),
        "dyvte-0.5 (DyVTE at 0.5)",
    }
    named = {row[1]: row[list(plans.columns).index("learned parts")] for row in plans.rows}
    assert named == dict.fromkeys(("full", "lc-2", "random0-2", "first-2")) | {"dyvte-0.5": "DyVTE at 0.5"}


def truncate(folder: Folder, key: str) -> None:
    name = f"answers/{key}.parquet"
    folder.write_bytes(name, folder.read_bytes(name)[:-9])


def shorten(folder: Folder, key: str) -> None:
    folder.write_table(f"answers/{key}", folder.read_table(f"answers/{key}").slice(1))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, key: folder.delete(f"answers/{key}.parquet"), "are missing"),
        (truncate, "cannot be read"),
        (shorten, "have fewer samples than their cells"),
    ],
)
def test_answers_that_are_not_there_are_named_at_the_top(
    damage: Callable[[Folder, str], None], said: str, tmp_path: Path
) -> None:
    folder = make_judged(tmp_path, failed=3)
    # A cell that gave no result has no answers to miss.
    rows = folder.read_table("cells").to_pylist()
    folder.write_table("cells", [row | ({"n": 0} if row["plan"] == "full" else {}) for row in rows])
    folder.delete(f"answers/{'0' * 64}.parquet")
    for key in (LC_2, DYVTE):
        damage(folder, key)
    page = build_page(folder)
    assert len(page.warnings) == 2 and page.warnings[0].startswith("This run is partial")
    assert page.warnings[1].startswith(f"The answers of 2 cells {said}: lc-2 on shapes, dyvte-0.5 on shapes.")
    # What the table of cells knows of the errors still stands.
    reasons = grid_of(page, "Errors by reason").rows
    assert [row[1] for row in reasons] == ([2] if damage is shorten else [3])


def test_no_damage_to_answers_is_a_traceback(tmp_path: Path) -> None:
    folder, chance = make_judged(tmp_path, failed=3), random.Random(0)
    name = f"answers/{DYVTE}.parquet"
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
