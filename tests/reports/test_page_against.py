"""Two sweeps or two campaigns compared."""

from pathlib import Path

import numpy as np
import pytest

from reports.page import build_page
from reports.page.against import correlations
from reports.page.document import Section
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import Mode
from tests.reports.runs import make_campaign, make_sweep


def compared(folder: Folder, other: Folder) -> Section:
    section = build_page(folder, against=other).sections[0]
    assert section.title.startswith("Against another")
    return section


def test_rank_correlations_are_those_of_the_textbook() -> None:
    first, second = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert correlations(first, second) == pytest.approx((0.8, 0.6))
    assert correlations(first, -first) == pytest.approx((-1, -1))
    # By hand: ranks 1.5 1.5 3 4 against 1 2 3 4, and 5 concordant pairs of sqrt(5 x 6).
    tied = np.array([1.0, 1, 2, 3])
    assert correlations(tied, np.arange(4.0)) == pytest.approx((4.5 / np.sqrt(4.5 * 5), 5 / np.sqrt(30)))
    assert correlations(np.zeros(3), np.arange(3.0)) == (None, None)


def test_layers_that_moved_and_what_differs_are_named(tmp_path: Path) -> None:
    own = make_sweep(tmp_path / "a", layers=12, samples=4)
    section = compared(own, own)
    correlated, moved = section.grids
    assert [row[:4] for row in correlated.rows] == [[mode, 1.0, 1.0, 0] for mode in ("freeze-visual", "freeze-text")]
    assert list(moved.rows) == [] and len(section.text) == 1
    assert {row["ratio"] for row in section.charts[0].data["rows"]} == {1.0, None}
    other = make_sweep(tmp_path / "b", layers=12, samples=4, seed=1, revision="v2", modes=[Mode.FREEZE_TEXT])
    section = compared(own, other)
    assert [row[0] for row in section.grids[0].rows] == ["freeze-text"]
    assert "They differ in revision: main here, v2 there." in section.text
    changes = [abs(int(row[4] or 0)) for row in section.grids[1].rows]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0


def test_runs_that_do_not_compare(tmp_path: Path) -> None:
    own = make_sweep(tmp_path / "a")
    with pytest.raises(Refused, match=r"5 layers.*one with 6; compare sweeps of models of one depth"):
        build_page(own, against=make_sweep(tmp_path / "b", layers=6))
    with pytest.raises(Refused, match="share a mode"):
        build_page(own, against=make_sweep(tmp_path / "c", modes=[Mode.DROP_VISUAL]))
    campaign, empty = make_campaign(tmp_path / "d"), make_campaign(tmp_path / "e")
    with pytest.raises(Refused, match=r"is a sweep, .* a campaign"):
        build_page(own, against=campaign)
    empty.write_table("metrics", [])
    with pytest.raises(Refused, match="compare campaigns that share cells"):
        build_page(campaign, against=empty)


def test_campaigns_are_compared_cell_by_cell(tmp_path: Path) -> None:
    own, other = make_campaign(tmp_path / "a", shift=0.02), make_campaign(tmp_path / "b")
    section = compared(own, other)
    main = section.charts[0].numbers.rows
    assert [row[2] for row in main] == ["exact_match"] * 4
    assert [row[6] for row in main] == [pytest.approx(0.02)] * 4
    # Two independent errors of 0.03 each.
    assert main[0][8] == pytest.approx(0.02 + 1.96 * 0.03 * np.sqrt(2))
    assert {row[-1] for row in section.grids[0].rows} == {"plan and task"}
    # The same name but another plan.
    table = other.read_table("metrics").to_pylist()
    other.write_table("metrics", [row | {"plan_digest": "f" * 64} for row in table if row["plan"] != "full"])
    found = {(row[2], row[-1]) for row in compared(own, other).grids[0].rows}
    assert found == {(plan, "task") for plan in ("lc-2", "random0-2", "first-2")}
