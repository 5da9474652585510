"""Changed answers on the page: counted for each plan, each image in it once, nothing of them markup, and bounded."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reports.page import build_page
from reports.page.changed import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Changed, cards_of, read_changed
from reports.page.document import render
from tests.reports.page.campaigns import add_changes, make_judged

EVIL = "</script><b>'& \u2028 What?"


def test_a_campaign_without_changes_has_no_section_of_them(tmp_path: Path) -> None:
    page = build_page(make_judged(tmp_path))
    assert "Changed answers" not in [section.title for section in page.sections]
    assert b"card-data" not in render(page)


def test_questions_stand_in_the_page_with_their_answers_and_each_image_once(tmp_path: Path) -> None:
    folder = make_judged(tmp_path)
    add_changes(folder, docs=6, text=EVIL)
    page = build_page(folder)
    section = next(section for section in page.sections if section.title == "Changed answers")
    assert section.grids[0].rows[0][2:] == ["lc-2", 6, 6, 6] and len(section.grids[0].rows) == 4
    text = render(page).decode()
    assert text.count("<script>") == 3 and "<b>'" not in text
    found = json.loads(re.search(r'id="card-data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert len(found["cards"]) == 6 and len(found["images"]) == 2
    assert {base64.b64decode(image)[:2] for image in found["images"]} == {b"\xff\xd8"}
    by_doc = {card["doc"]: card for card in found["cards"]}
    assert by_doc[0]["image"] == by_doc[1]["image"] != by_doc[3]["image"] and by_doc[2]["image"] is None
    assert by_doc[0]["question"] == f"{EVIL} 0" and by_doc[1]["score"] == 0.5
    own = by_doc[0]["rows"]
    assert [row["plan"] for row in own] == ["lc-2", "random0-2", "first-2", "dyvte-0.5"]
    assert [row["change"] for row in own] == ["worse", "better", "other", "worse"]
    assert [row["score"] for row in own] == [0.0, 1.0, None, 0.0] and own[0]["answer"] == "lc-2 says 0"
    # The questions that most plans answered worse come first.
    worse = [sum(row["change"] == "worse" for row in card["rows"]) for card in found["cards"]]
    assert worse == sorted(worse, reverse=True)


def _many(count: int, **changes: Any) -> Changed:
    row = {"model": "m", "task": "t", "kind": "k", "sample_id": "s", "target": None, "full_prediction": None}
    row |= {"question": "é" * 290, "prediction": "x" * 5_000, "full_score": float("nan"), "score": None, **changes}
    rows = [
        row | {"plan": f"p{number // 50}", "doc": number % 700, "change": "worse", "total": 50}
        for number in range(count)
    ]
    images = [{"task": "t", "doc": doc, "image": doc.to_bytes(2, "big") * 6_000} for doc in range(700)]
    return Changed(rows=rows, thumbnails=images)


def test_a_large_campaign_stays_within_its_bytes_and_every_plan_keeps_rows() -> None:
    cards = cards_of(_many(9_000))
    assert cards is not None and 1_000 < cards.shown < cards.total == 9_000
    assert len(json.dumps(cards.cards)) < MAX_TEXT_BYTES and sum(map(len, cards.images)) <= MAX_IMAGE_BYTES
    assert len(cards.names["plan"]) == 180
    shown = [card["image"] for card in cards.cards]
    assert None in shown and max(image for image in shown if image is not None) == len(cards.images) - 1
    json.dumps(cards.cards, allow_nan=False)


@pytest.mark.parametrize("names", [("changes",), ("thumbnails",), ("changes", "thumbnails")])
def test_either_table_may_be_missing(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = make_judged(tmp_path)
    add_changes(folder)
    for name in names:
        folder.delete(f"{name}.parquet")
    cards = cards_of(read_changed(folder))
    assert (cards is None) == ("changes" in names)
    assert cards is None or {card["image"] for card in cards.cards} == {None}
