"""Kinds of plans: what a plan is to the reader, and colours and shapes that tell kinds apart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from reports.page import campaign_data
from reports.page.campaign_data import KINDS, kind_of_plan, parts_of_plan
from shortv.plan import PartsKind

PAGE = Path(campaign_data.__file__).parent
MIXED = ["full", "freeze-visual", "full"]


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ({"kind": "full", "modes": ["full"] * 3}, "full model"),
        ({"kind": "random", "modes": MIXED}, "random control"),
        ({"kind": "plan", "modes": MIXED, "source": {"order": "lc"}}, "LC plan"),
        ({"kind": "plan", "modes": MIXED, "source": {"order": "last"}}, "last-layers control"),
        ({"kind": "plan", "modes": MIXED}, "other plan"),
        ({"kind": "plan", "modes": ["no-visual-ffn"] * 3, "source": {"order": "fixed"}}, "one mode in all layers"),
        ({"kind": "plan", "modes": ["full", "drop-visual", "drop-visual"]}, "exit at a fixed layer"),
        ({"kind": "plan", "modes": ["drop-visual"] * 3}, "exit at a fixed layer"),
        ({"kind": "plan", "modes": ["freeze-visual", "drop-visual"]}, "other plan"),
        ({"kind": "plan", "modes": ["freeze-visual"] * 3, "parts": {"kind": "saisa"}}, "SAISA"),
        ({"kind": "plan", "modes": ["full"] * 3, "parts": {"kind": "dyvte", "threshold": 0.5}}, "DyVTE"),
        ({"kind": "plan", "modes": ["full"] * 3, "parts": {"kind": "eas"}, "source": {"order": "lc"}}, "EAS"),
        ({"kind": "plan", "modes": ["full"] * 3, "parts": {"kind": ["unknown"]}}, "other plan"),
    ],
)
def test_what_a_plan_is(plan: dict[str, Any], kind: str) -> None:
    assert kind_of_plan(plan) == kind


def test_every_learned_system_has_a_kind_and_a_name() -> None:
    assert {kind_of_plan({"kind": "plan", "parts": {"kind": str(kind)}}) for kind in PartsKind} == set(KINDS[8:])
    assert parts_of_plan({"parts": {"kind": "dyvte", "threshold": 0.99}}) == "DyVTE at 0.99"
    assert parts_of_plan({"parts": {"kind": "eas", "threshold": None}}) == "EAS"
    assert parts_of_plan({"parts": None}) is None


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
