"""Answers that plans changed, as the page shows them: a card for each question, within a bound of bytes."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reports.changes import CHANGES
from reports.page.document import Cards, Row, cut
from reports.store import Folder

MAX_TEXT_BYTES: Final = 1_000_000
MAX_IMAGE_BYTES: Final = 1_600_000
"""Bounds on questions and answers, and on their images, as the page has them: JSON and base64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Rows of the tables `changes` and `thumbnails`; None where the campaign has no such tables."""

    rows: Sequence[Row] | None = None
    thumbnails: Sequence[Row] = ()


def read_changed(folder: Folder) -> Changed:
    """Read what a campaign says of changed answers. Raises ShortVError for a damaged table."""
    if not folder.exists("changes.parquet"):
        return Changed()
    has_images = folder.exists("thumbnails.parquet")
    return Changed(
        rows=folder.read_table("changes").to_pylist(),
        thumbnails=folder.read_table("thumbnails").to_pylist() if has_images else (),
    )


def cards_of(changed: Changed) -> Cards | None:
    """Return a card for each question, those that most plans answered worse first; None without any.

    Where the texts would be too large, every plan has fewer rows; where the images would be, the last cards have none.
    """
    rows = every = list(changed.rows or ())
    # The rows of a plan lie together, so that every second one of all rows halves each plan.
    while len(json.dumps(cards := _cards(rows))) > MAX_TEXT_BYTES:
        rows = rows[::2]
    if not rows:
        return None
    names = {name: list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "task", "plan")}
    return Cards(
        names=names | {"kind": sorted({row["kind"] for row in rows if row["kind"]})},
        images=_add_images(cards, {(row["task"], row["doc"]): row["image"] for row in changed.thumbnails}),
        cards=cards,
        shown=len(rows),
        total=len(every),
    )


def _cards(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        card = {name: row[name] for name in ("model", "task", "doc", "kind")} | {"image": None, "rows": []}
        card |= {"sample": row["sample_id"], "question": cut(row["question"]), "target": cut(row["target"])}
        card |= {"answer": cut(row["full_prediction"]), "score": _finite(row["full_score"])}
        own = {"plan": row["plan"], "change": row["change"]}
        own |= {"answer": cut(row["prediction"]), "score": _finite(row["score"])}
        found.setdefault((row["model"], row["task"], row["doc"]), card)["rows"].append(own)
    return sorted(found.values(), key=lambda card: -sum(row["change"] == CHANGES[0] for row in card["rows"]))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _add_images(cards: Sequence[dict[str, Any]], files: Mapping[tuple[str, int], bytes | None]) -> list[str]:
    """Give the cards their images as far as the bound allows, and return each distinct one once."""
    places: dict[str, int] = {}
    left = MAX_IMAGE_BYTES
    for card in cards:
        image = base64.b64encode(files.get((card["task"], card["doc"])) or b"").decode()
        if image and image not in places and len(image) <= left:
            places[image] = len(places)
            left -= len(image)
        card["image"] = places.get(image)
    return list(places)


def counts_of(changed: Changed) -> list[dict[str, Any]]:
    """Return for each plan with changed answers how many got worse, better, or neither."""
    found: dict[Any, dict[str, Any]] = {}
    for row in changed.rows or ():
        names = {name: row[name] for name in ("model", "task", "plan")}
        found.setdefault(tuple(names.values()), names | dict.fromkeys(CHANGES, 0))[row["change"]] = row["total"]
    return list(found.values())
