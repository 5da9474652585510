"""What the page of a campaign says of plans with learned parts, of exit layers, and of answers that are not there."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.page import build_page
from reports.page.campaign_data import read_campaign_data
from reports.page.document import Chart, Grid, Page
from reports.page.rendering import render
from reports.store import Folder
from tests.reports.page.campaigns import make_judged

LC_2, DYVTE = "1" * 64, "a" * 64


def charts_of(page: Page) -> dict[str, Chart]:
    return {chart.key: chart for section in page.sections for chart in section.charts}


def grid_of(page: Page, caption: str) -> Grid:
    return next(grid for section in page.sections for grid in section.grids if grid.caption == caption)


def test_every_link_of_a_page_leads_to_a_file(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path / "run"))
    links = re.findall(r'<a href="([^"#]+)"', render(page).decode())
    assert f"answers/{DYVTE}.parquet" in links
    assert [link for link in links if not (tmp_path / "run" / link).is_file()] == []
    assert charts_of(page)["exits-0"].numbers.files == [f"answers/{DYVTE}.parquet"]


def test_strips_and_table_name_learned_parts(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path))
    assert {row["plan"] for row in charts_of(page)["plans-0"].data["rows"]} == {
        *("full", "lc-2", "random0-2", "first-2"),
        "dyvte-0.5 (DyVTE at 0.5)",
    }
    plans = grid_of(page, "Plans")
    learned = list(plans.columns).index("learned parts")
    assert {row[1]: row[learned] for row in plans.rows}["dyvte-0.5"] == "DyVTE at 0.5"
    assert {row[learned] for row in plans.rows} == {None, "DyVTE at 0.5"}


def test_a_whole_campaign_warns_of_nothing_and_names_its_intervals(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path))
    assert page.warnings == [] and "cut to the range 0 to 1" in charts_of(page)["accuracy-0"].note


def shorten(folder: Folder, key: str) -> None:
    folder.write_table(f"answers/{key}", folder.read_table(f"answers/{key}").slice(1))


def truncate(folder: Folder, key: str) -> None:
    name = f"answers/{key}.parquet"
    folder.write_bytes(name, folder.read_bytes(name)[:-9])


def of_another_table(folder: Folder, key: str) -> None:
    folder.write_bytes(f"answers/{key}.parquet", folder.read_bytes("cells.parquet"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, key: folder.delete(f"answers/{key}.parquet"), "are missing"),
        (truncate, "cannot be read"),
        (of_another_table, "cannot be read"),
        (shorten, "have fewer samples than their cells"),
    ],
)
def test_answers_that_are_not_there_are_named_at_the_top(
    damage: Callable[[Folder, str], None], said: str, tmp_path: Path
) -> None:
    folder = make_judged(tmp_path, failed=3)
    for key in (LC_2, DYVTE):
        damage(folder, key)
    page = build_page(folder)
    assert len(page.warnings) == 2 and page.warnings[0].startswith("This run is partial")
    assert page.warnings[1].startswith(f"The answers of 2 cells {said}: lc-2 on shapes, dyvte-0.5 on shapes.")
    head = render(page).decode().partition("<main")[0]
    assert head.count('<p class="warning" role="status">') == 2
    # What the table of cells knows of the errors still stands.
    reasons = grid_of(page, "Errors by reason").rows
    assert [row[1] for row in reasons] == ([2] if damage is shorten else [3])


def test_a_cell_that_gave_no_result_has_no_answers_to_miss(tmp_path: Path) -> None:
    folder = make_judged(tmp_path)
    rows = folder.read_table("cells").to_pylist()
    folder.write_table("cells", [row | ({"n": 0} if row["plan"] == "full" else {}) for row in rows])
    folder.delete(f"answers/{'0' * 64}.parquet")
    assert build_page(folder).warnings == []


def test_no_damage_to_answers_is_a_traceback(tmp_path: Path) -> None:
    folder, chance = make_judged(tmp_path, failed=3), random.Random(0)
    name = f"answers/{DYVTE}.parquet"
    whole = folder.read_bytes(name)
    for _ in range(30):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        folder.write_bytes(name, bytes(changed))
        assert read_campaign_data(folder).manifest.state == "partial"
