"""Sweep, campaign and training folders for tests, made without a model, and ways to damage them."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reports.manifest import CampaignManifest, SweepManifest, TrainingManifest
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.plan import VISUAL_MODES, LearnedParts, Mode, PartsKind, Plan

MODES = tuple(mode for mode in Mode if mode is not Mode.FULL)
DIGEST = "d" * 64
TIMES = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"}
RUN: dict[str, Any] = {"state": "complete", "versions": {"python": "3.11", "torch": "2.15.0"}, **TIMES}
MODEL_RUN = RUN | {"arguments_digest": DIGEST, "revision": "main", "config_digest": DIGEST}
PLANS = (
    ("full", "full", 1.0, 0.9),
    ("lc-2", "plan", 0.7, 0.88),
    ("random0-2", "random", 0.7, 0.6),
    ("first-2", "first", 0.7, 0.4),
)
"""Name, kind, FLOPs ratio and main metric of the plans of `make_campaign`."""


def make_sweep(
    path: Path,
    *,
    samples: int = 3,
    layers: int = 5,
    modes: Sequence[Mode] = MODES[:2],
    seed: int = 0,
    rows_per_part: int = 200_000,
    **changes: Any,
) -> Folder:
    """Write a finished sweep: LC falls with depth and is zero in the last layer; the last sample has no image."""
    folder = Folder(path)
    random = np.random.default_rng(seed)
    ids = [f"sample-{number:05d}" for number in range(samples)]
    visual = [0 if number == samples - 1 and samples > 1 else 36 for number in range(samples)]
    used = [
        {"sample_id": name, "dataset": "shapes", "prompt": f"<b>What</b> is {name}?", "answer": None, "n_text": 12}
        | {"n_visual": count}
        for name, count in zip(ids, visual, strict=True)
    ]
    ranked: list[dict[str, Any]] = []
    tables: list[pa.Table] = []
    for number, mode in enumerate(modes):
        kl_SL = 10.0 ** (-np.arange(layers) * 6 / layers - number / 2) * random.lognormal(0, 1.5, (samples, layers))
        kl_SL[:, -1] = 0.0
        columns = {
            "sample_id": np.repeat(np.array(ids, dtype=object), layers),
            "mode": [mode.value] * (samples * layers),
            "layer": np.tile(np.arange(layers, dtype=np.int32), samples),
            "kl_full_ablated": kl_SL.ravel(),
            "kl_ablated_full": kl_SL.ravel() * 2,
            "top1_changed": (kl_SL > 0.1).ravel(),
        }
        tables.append(pa.table(columns, schema=SCHEMAS["lc_samples"]))
        ranked += _ranked(mode, kl_SL[np.array(visual) > 0] if mode in VISUAL_MODES else kl_SL)
    rows = pa.concat_tables(tables)
    for part, start in enumerate(range(0, rows.num_rows, rows_per_part)):
        folder.write_table(f"lc_samples/part-{part:05d}", rows.slice(start, rows_per_part))
    for table, content in (("samples", used), ("errors", []), ("lc_layers", ranked)):
        folder.write_table(table, content)
    chosen = range(layers - 2, layers)
    plan = Plan.of_layers(modes[0], chosen, num_layers=layers, name="two", model="m", config_digest=DIGEST)
    folder.write_bytes("plans/two.json", plan.to_json().encode())
    sweep_manifest(samples=samples, layers=layers, modes=modes, **changes).save(folder)
    return folder


def _ranked(mode: Mode, kl_SL: Any) -> list[dict[str, Any]]:
    means = kl_SL.mean(axis=0)
    order = np.argsort(means, kind="stable").tolist()
    return [
        {"mode": mode.value, "layer": layer, "n": len(kl_SL), "kl_direction": "full-ablated", "mean": mean}
        | {"ci_low": mean / 2, "ci_high": mean * 2, "rank": order.index(layer) + 1}
        | {"rank_low": max(order.index(layer), 1), "rank_high": min(order.index(layer) + 2, len(means))}
        for layer, mean in enumerate(means.tolist())
    ]


def sweep_manifest(
    *, samples: int = 3, layers: int = 5, modes: Sequence[Mode] = MODES[:2], **changes: Any
) -> SweepManifest:
    """The manifest of `make_sweep`."""
    names = [str(mode) for mode in modes]
    arguments = {"model": "org/m", "calibration": ["a b.parquet", "gqa:20"], "modes": names}
    arguments |= {"kl-direction": "full-ablated", "limit": 20.0, "seed": 0, "model-digest": DIGEST}
    values: dict[str, Any] = MODEL_RUN | {
        "arguments": arguments | {"trust-remote-code": True, "chat-template": None},
        "model": "org/<script>alert(1)</script>",
        "num_layers": layers,
        "modes": tuple(names),
        "kl_direction": "full-ablated",
        "calibration_ids": tuple(f"sample-{number:05d}" for number in range(samples)),
        "calibration_digest": DIGEST,
        "seed": 0,
        "noise_floor": 1e-9,
        "counts": {"samples": samples, "used": samples, "errors": 0, "without_image": int(samples > 1)},
        "stability": {name: {"0.5": 0.9} for name in names[:1]},
        "wall_seconds": 60.0,
    }
    return SweepManifest(**(values | changes))


def make_campaign(path: Path, *, shift: float = 0.0, failed: int = 0, **changes: Any) -> Folder:
    """Write a finished campaign of four plans on one task; `failed` samples of the plan lc-2 have no answer."""
    folder = Folder(path)
    cells, metrics, speed, compared, answers = [], [], [], [], []
    for number, (name, _, flops, value) in enumerate(PLANS):
        names = {"cell": f"{number}" * 64, "model": "org/m", "plan": name, "task": "shapes"}
        digest, lost = {"plan_digest": f"{number}" * 64}, failed if name == "lc-2" else 0
        cell: dict[str, Any] = dict.fromkeys(SCHEMAS["cells"].names) | names | digest
        cell |= {"task_digest": DIGEST, "limit": 50.0, "seed": 0, "n": 50, "flops_ratio": flops, "busy_seconds": 2.0}
        cell |= {"state": "partial" if lost else "complete", "message": "too long" if lost else None, "errors": lost}
        cells.append(cell)
        score = names | digest | {"filter": "none", "stderr": 0.03, "stderr_clt": 0.03, "n": 50 - lost}
        metrics.append(score | {"metric": "exact_match", "value": value + shift, "stderr_clustered": None})
        metrics.append(score | {"metric": "exact_match_colour", "value": value / 2, "stderr_clustered": 0.04})
        ratio = {
            "prefill_ratio": flops + 0.1 * (1 - flops),
            "prefill_ratio_stderr": 0.01,
            "batch": 16,
            "kv_bytes": 4096.0,
        }
        times = {"batch_prefill_ms": 100 * flops + 10, "idle_share": 0.25, **ratio}
        times |= {"prefill_ms_median": 100 * flops + 8, "decode_ms_per_token_median": 2.0, "latency_ms_median": 150.0}
        rest = {"n": 50, "samples_per_second": 60.0, "t": 12.0, "v": 36.0, "flops_ratio": flops, "replicas": 1}
        speed.append(dict.fromkeys(SCHEMAS["speed"].names) | names | times | rest)
        if name != "full":
            change = value - 0.9
            interval = {"difference": change, "ci_low": change - 0.05, "ci_high": change + 0.05, "share_changed": 0.1}
            sides = {"metric": "exact_match", "against": "full", "n": 50, "value": value, "against_value": 0.9}
            tested = {"subset": "all", "family": "main", "p_value": 0.01, "p_holm": 0.03, "q_bh": 0.02}
            spread = {"sd": 0.2, "discordant": 0.04}
            compared.append(names | sides | interval | tested | spread)
        answers += [_answer(names, place, lost) for place in range(50)]
    write_answers(folder, answers)
    for table, rows in (("cells", cells), ("metrics", metrics), ("speed", speed), ("comparisons", compared)):
        folder.write_table(table, rows)
    campaign_manifest(state="partial" if failed else "complete", errors=failed, **changes).save(folder)
    return folder


def _answer(names: dict[str, str], place: int, lost: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["answers"].names) | names
    row |= {"error": "the prompt is too long"} if place < lost else {"prediction": "red"}
    return row | {"doc": place, "sample_id": f"s{place}", "scores": []}


def write_answers(folder: Folder, rows: Iterable[dict[str, Any]], per_part: int = 32) -> None:
    """Write answers as a campaign does: a part for each shard of documents, with the answers of all plans."""
    shards = defaultdict[int, list[dict[str, Any]]](list)
    for row in rows:
        shards[row["doc"] // per_part].append(row)
    for number, shard in shards.items():
        folder.write_table(f"answers/part-{number:06d}", shard)


def keep_answers(folder: Folder, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove all other answers from the parts."""
    for name in folder.list("answers"):
        folder.write_table(name, list(filter(wanted, folder.read_table(name).to_pylist())))


def campaign_manifest(*, errors: int = 0, **changes: Any) -> CampaignManifest:
    """The manifest of `make_campaign`."""
    modes = ["full", "full", "full", "freeze-visual", "freeze-visual"]
    plans = [
        {"model": "org/m", "name": name, "kind": kind, "same_as": None, "digest": f"{number}" * 64}
        | {"modes": ["full"] * 5 if kind == "full" else modes, "ranking": [], "source": {"order": "lc"}}
        for number, (name, kind, _, _) in enumerate(PLANS)
    ]
    arguments = {"models": ["org/m"], "plans": ["full", "sweep:runs/demo@2"], "tasks": ["shapes"], "limit": 50.0}
    arguments |= {"gen_kwargs": {"temperature": 0}, "output_path": "/tmp/x", "retry_failed": True, "batch_size": 16}
    values: dict[str, Any] = RUN | {
        "arguments": arguments,
        "models": ({"name": "org/m", "revision": None, "digest": None, "config_digest": DIGEST},),
        "plans": tuple(plans),
        "tasks": ({"name": "shapes", "digest": DIGEST, "num_docs": 50, "main_metric": "exact_match"},),
        "seed": 0,
        "counts": {"cells": 4, "complete": 4, "samples": 200, "errors": errors},
        "wall_seconds": 8.0,
    }
    return CampaignManifest(**(values | changes))


def make_training(path: Path, *, steps: int = 3, **changes: Any) -> Folder:
    """Write a finished training of DyVTE's routers with a plan."""
    folder = Folder(path)
    empty = {"learning_rate": None, "samples_per_second": None, "seconds": 1.0, "metrics": []}
    rows = [empty | {"step": step, "samples": 16 * step, "loss": 1 / step} for step in range(1, steps + 1)]
    folder.write_table("training", rows)
    folder.write_json("parts/parts.json", {"schema": 1, "kind": "dyvte", "parameters": 132_096})
    folder.write_bytes("parts/parts.safetensors", b"weights")
    parts = LearnedParts(kind=PartsKind.DYVTE, path="../parts", digest=DIGEST, threshold=0.5)
    plan = Plan(name="dyvte-0.5", model="m", config_digest=DIGEST, num_layers=2, modes=(Mode.FULL,) * 2, parts=parts)
    folder.write_bytes("plans/dyvte-0.5.json", plan.to_json().encode())
    training_manifest(steps=steps, **changes).save(folder)
    return folder


def training_manifest(*, steps: int = 3, **changes: Any) -> TrainingManifest:
    """The manifest of `make_training`."""
    values: dict[str, Any] = MODEL_RUN | {
        "parts": "dyvte",
        "arguments": {"model": "org/m"},
        "model": "org/m",
        "num_layers": 2,
        "data_digest": DIGEST,
        "counts": {"steps": steps, "samples": 48, "errors": 0},
        "details": {"device": "cpu", "loss": 0.0775, "train_seconds": 112.0},
    }
    return TrainingManifest(**(values | changes))


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write other values into a manifest."""
    change_json(folder / "manifest.json", **changes)


def change_json(path: Path, **changes: Any) -> None:
    """Write other values into a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    """Remove the end of a file."""
    path.write_bytes(path.read_bytes()[:-20])
