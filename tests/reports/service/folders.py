"""Campaign and training folders for the tests of the service, as their jobs leave them."""

import json
from pathlib import Path
from typing import Any

from reports.manifest import TrainingManifest
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.plan import LearnedParts, Mode, PartsKind, Plan
from tests.reports import runs
from tests.reports.runs import DIGEST


def make_campaign(path: Path, *, failed: int = 0, **changes: Any) -> Folder:
    """Write the campaign of the page's tests with all its answers."""
    folder = runs.make_campaign(path, failed=failed, **changes)
    empty = dict.fromkeys(SCHEMAS["answers"].names)
    for cell in folder.read_table("cells").to_pylist():
        names = {name: cell[name] for name in ("cell", "model", "plan", "task")}
        rows = [
            empty
            | names
            | {"sample_id": f"s{place}", "scores": []}
            | ({"error": "the prompt is too long"} if place < cell["errors"] else {"prediction": "red"})
            for place in range(cell["n"])
        ]
        folder.write_table(f"answers/{cell['cell']}", rows)
    return folder


def make_training(path: Path, *, steps: int = 3, **changes: Any) -> Folder:
    """Write a finished training of DyVTE's routers with a plan."""
    folder = Folder(path)
    rows = [
        {"step": step, "samples": 16 * step, "loss": 1 / step, "learning_rate": None, "samples_per_second": None}
        | {"seconds": 1.0, "metrics": []}
        for step in range(1, steps + 1)
    ]
    folder.write_table("training", rows)
    folder.write_json("parts/parts.json", {"schema": 1, "kind": "dyvte", "parameters": 132_096})
    folder.write_bytes("parts/parts.safetensors", b"weights")
    parts = LearnedParts(kind=PartsKind.DYVTE, path="../parts", digest=DIGEST, threshold=0.5)
    plan = Plan(name="dyvte-0.5", model="m", config_digest=DIGEST, num_layers=2, modes=(Mode.FULL,) * 2, parts=parts)
    folder.write_bytes("plans/dyvte-0.5.json", plan.to_json().encode())
    values: dict[str, Any] = {
        "parts": "dyvte",
        "state": "complete",
        "arguments": {"model": "org/m"},
        "arguments_digest": DIGEST,
        "versions": {},
        "model": "org/m",
        "revision": None,
        "config_digest": DIGEST,
        "num_layers": 2,
        "data_digest": DIGEST,
        "counts": {"steps": steps, "samples": 48, "errors": 0},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "details": {"device": "cpu", "loss": 0.0775, "train_seconds": 112.0},
    }
    TrainingManifest(**(values | changes)).save(folder)
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write other values into a manifest."""
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(value | changes))


def flip_bytes(path: Path) -> None:
    """Damage the data of a Parquet file, and leave its footer whole."""
    data = bytearray(path.read_bytes())
    data[4:64] = bytes(255 - byte for byte in data[4:64])
    path.write_bytes(bytes(data))
