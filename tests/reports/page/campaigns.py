"""Campaigns with all their answers and with plans that decide for each sample where its visual tokens leave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reports.changes import CHANGES
from reports.manifest import CampaignManifest
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.evals.preview import thumbnail
from tests.reports.runs import make_campaign, write_answers

SAMPLES, LAYERS = 50, 5
TABLES = ("cells", "metrics", "speed", "comparisons")


class Exiting(NamedTuple):
    """A DyVTE plan of a campaign: its FLOPs ratio and its main metric."""

    name: str
    threshold: float
    flops: float
    value: float


DYVTE = (Exiting("dyvte-0.5", 0.5, 0.62, 0.7),)


def make_judged(path: Path, *, failed: int = 0, learned: Sequence[Exiting] = DYVTE) -> Folder:
    """Write the campaign of `make_campaign` with DyVTE plans beside the others, and the answers of every cell."""
    folder = make_campaign(path, failed=failed)
    tables: dict[str, list[Any]] = {name: folder.read_table(name).to_pylist() for name in TABLES}
    plans = [*folder.read_json("manifest.json")["plans"]]
    for number, plan in enumerate(learned):
        key = chr(ord("a") + number) * 64
        own = {"plan": plan.name, "cell": key, "plan_digest": key, "flops_ratio": plan.flops, "value": plan.value}
        for rows in tables.values():
            rows += [row | {name: own[name] for name in own if name in row} for row in rows if row["plan"] == "first-2"]
        parts = {"kind": "dyvte", "path": "/parts", "digest": key, "threshold": plan.threshold}
        facts = {"name": plan.name, "kind": "plan", "digest": key, "modes": ["full"] * LAYERS}
        plans.append(plans[0] | facts | {"parts": parts, "source": {}})
    for name, rows in tables.items():
        folder.write_table(name, rows)
    exiting = {plan.name for plan in learned}
    answers = [_answer(cell, place, cell["plan"] in exiting) for cell in tables["cells"] for place in range(cell["n"])]
    write_answers(folder, answers)
    manifest = CampaignManifest.load(folder).to_json()
    counts = manifest["counts"] | {"cells": len(tables["cells"])}
    CampaignManifest.from_json(manifest | {"plans": plans, "counts": counts}).save(folder)
    return folder


def _answer(cell: dict[str, Any], place: int, exits: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["answers"].names)
    row |= {name: cell[name] for name in ("cell", "model", "plan", "task")}
    kind = ("count", "colour")[place % 2]
    row |= {
        "doc": place,
        "sample_id": f"s{place}",
        "scores": [],
        "kind": kind,
        "exit_layer": place % LAYERS if exits else None,
    }
    return row | {"error": "the prompt is too long"} if place < cell["errors"] else row


def add_changes(
    folder: Folder, *, docs: int = 30, tasks: Sequence[str] = ("shapes",), text: str = "What is it?"
) -> None:
    """Write changed answers of every plan but the full one: each plan changed every document, in each way in turn.

    Two documents in a row have the same image, and the third one has none.
    """
    plans = [plan for plan in CampaignManifest.load(folder).plans if plan["name"] != "full"]
    rows, thumbnails = [], []
    for task in tasks:
        for place, plan in enumerate(plans):
            for doc in range(docs):
                change = CHANGES[(doc + place) % 3]
                row = {"model": plan["model"], "task": task, "plan": plan["name"], "doc": doc, "sample_id": f"s{doc}"}
                row |= {"kind": ("count", "colour")[doc % 2], "target": "red", "question": f"{text} {doc}"}
                row |= {"full_prediction": "blue", "prediction": f"{plan['name']} says {doc}", "full_score": 0.5}
                rows.append(row | {"score": {"worse": 0.0, "better": 1.0}.get(change), "change": change, "total": docs})
        for doc in range(docs):
            image = Image.new("RGB", (64, 48), (doc // 3 * 8 % 256, len(task), 99)) if doc % 3 != 2 else None
            row = {"task": task, "doc": doc, "sample_id": f"s{doc}", "question": f"{text} {doc}"}
            thumbnails.append(row | {"image": thumbnail([image] if image else [])})
    folder.write_table("changes", rows)
    folder.write_table("thumbnails", thumbnails)
