"""Sweep and campaign folders for the tests of the page, made without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reports.manifest import CampaignManifest, SweepManifest
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.plan import VISUAL_MODES, Mode, Plan

MODES = tuple(mode for mode in Mode if mode is not Mode.FULL)
DIGEST = "d" * 64


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
        tables.append(_measurements(ids, mode, kl_SL))
        counted = kl_SL[np.array(visual) > 0] if mode in VISUAL_MODES else kl_SL
        ranked += _ranked(mode, counted)
    rows = pa.concat_tables(tables)
    for part, start in enumerate(range(0, rows.num_rows, rows_per_part)):
        folder.write_table(f"lc_samples/part-{part:05d}", rows.slice(start, rows_per_part))
    for table, content in (("samples", used), ("errors", []), ("lc_layers", ranked)):
        folder.write_table(table, content)
    plan = Plan.of_layers(
        modes[0], range(layers - 2, layers), num_layers=layers, name="two", model="m", config_digest=DIGEST
    )
    folder.write_bytes("plans/two.json", plan.to_json().encode())
    sweep_manifest(samples=samples, layers=layers, modes=modes, **changes).save(folder)
    return folder


def sweep_manifest(*, samples: int, layers: int, modes: Sequence[Mode], **changes: Any) -> SweepManifest:
    """The manifest of `make_sweep`."""
    values: dict[str, Any] = {
        "state": "complete",
        "arguments": {
            "model": "org/m",
            "calibration": ["a b.parquet", "gqa:20"],
            "modes": [str(mode) for mode in modes],
        }
        | {"kl-direction": "full-ablated", "limit": 20.0, "seed": 0, "model-digest": DIGEST, "trust-remote-code": True}
        | {"chat-template": None},
        "arguments_digest": DIGEST,
        "versions": {"python": "3.11", "torch": "2.15.0"},
        "model": "org/<script>alert(1)</script>",
        "revision": "main",
        "config_digest": DIGEST,
        "num_layers": layers,
        "modes": tuple(str(mode) for mode in modes),
        "kl_direction": "full-ablated",
        "calibration_ids": tuple(f"sample-{number:05d}" for number in range(samples)),
        "calibration_digest": DIGEST,
        "seed": 0,
        "noise_floor": 1e-9,
        "counts": {"samples": samples, "used": samples, "errors": 0, "without_image": int(samples > 1)},
        "stability": {str(mode): {"0.5": 0.9} for mode in modes[:1]},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "wall_seconds": 60.0,
    }
    return SweepManifest(**(values | changes))


def _measurements(ids: Sequence[str], mode: Mode, kl_SL: Any) -> pa.Table:
    samples, layers = kl_SL.shape
    columns = {
        "sample_id": np.repeat(np.array(ids, dtype=object), layers),
        "mode": [mode.value] * (samples * layers),
        "layer": np.tile(np.arange(layers, dtype=np.int32), samples),
        "kl_full_ablated": kl_SL.ravel(),
        "kl_ablated_full": kl_SL.ravel() * 2,
        "top1_changed": (kl_SL > 0.1).ravel(),
    }
    return pa.table(columns, schema=SCHEMAS["lc_samples"])


def _ranked(mode: Mode, kl_SL: Any) -> list[dict[str, Any]]:
    means = kl_SL.mean(axis=0)
    order = np.argsort(means, kind="stable").tolist()
    count = len(means)
    return [
        {"mode": mode.value, "layer": layer, "n": len(kl_SL), "kl_direction": "full-ablated", "mean": mean}
        | {"ci_low": mean / 2, "ci_high": mean * 2, "rank": order.index(layer) + 1}
        | {"rank_low": max(order.index(layer), 1), "rank_high": min(order.index(layer) + 2, count)}
        for layer, mean in enumerate(means.tolist())
    ]


PLANS = (
    ("full", "full", 1.0, 0.9),
    ("lc-2", "plan", 0.7, 0.88),
    ("random0-2", "random", 0.7, 0.6),
    ("first-2", "first", 0.7, 0.4),
)


def make_campaign(path: Path, *, shift: float = 0.0, failed: int = 0, **changes: Any) -> Folder:
    """Write a finished campaign of four plans on one task; `failed` samples of the plan lc-2 have no answer."""
    folder = Folder(path)
    cells, metrics, speed, compared = [], [], [], []
    for number, (name, _, flops, value) in enumerate(PLANS):
        names = {"cell": f"{number}" * 64, "model": "org/m", "plan": name, "task": "shapes"}
        lost = failed if name == "lc-2" else 0
        dates = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"}
        facts = {
            "revision": None,
            "plan_digest": f"{number}" * 64,
            "same_as": None,
            "task_digest": DIGEST,
            "limit": 50.0,
        }
        state = {"state": "partial" if lost else "complete", "message": "too long" if lost else None}
        cells.append(
            names
            | facts
            | dates
            | state
            | {"seed": 0, "n": 50, "errors": lost, "flops_ratio": flops, "wall_seconds": 2.0}
            | {"learned_parameters": None, "train_seconds": None}
        )
        score = {"plan_digest": f"{number}" * 64, "filter": "none", "stderr": 0.03, "stderr_clt": 0.03, "n": 50 - lost}
        metrics.append(names | score | {"metric": "exact_match", "value": value + shift, "stderr_clustered": None})
        metrics.append(names | score | {"metric": "exact_match_colour", "value": value / 2, "stderr_clustered": 0.04})
        speed.append(_speed(names, flops))
        if name != "full":
            compared.append(_comparison(name, value))
        if lost:
            folder.write_table(f"answers/{number}{f'{number}' * 63}", [_lost(names, place) for place in range(lost)])
    for table, rows in (("cells", cells), ("metrics", metrics), ("speed", speed), ("comparisons", compared)):
        folder.write_table(table, rows)
    campaign_manifest(state="partial" if failed else "complete", errors=failed, **changes).save(folder)
    return folder


def campaign_manifest(*, state: str, errors: int = 0, **changes: Any) -> CampaignManifest:
    """The manifest of `make_campaign`."""
    modes = ["full", "full", "full", "freeze-visual", "freeze-visual"]
    plans = [
        {"model": "org/m", "name": name, "kind": kind, "same_as": None, "digest": f"{number}" * 64}
        | {"modes": ["full"] * 5 if kind == "full" else modes, "ranking": [], "source": {"order": "lc"}}
        for number, (name, kind, _, _) in enumerate(PLANS)
    ]
    values: dict[str, Any] = {
        "state": state,
        "arguments": {"models": ["org/m"], "plans": ["full", "sweep:runs/demo@2"], "tasks": ["shapes"], "limit": 50.0}
        | {"gen_kwargs": {"temperature": 0}, "output_path": "/tmp/x", "retry_failed": True, "batch_size": 16},
        "versions": {"python": "3.11"},
        "models": ({"name": "org/m", "revision": None, "digest": None, "config_digest": DIGEST},),
        "plans": tuple(plans),
        "tasks": ({"name": "shapes", "digest": DIGEST, "num_docs": 50, "main_metric": "exact_match"},),
        "seed": 0,
        "counts": {"cells": 4, "complete": 4, "samples": 200, "errors": errors},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "wall_seconds": 8.0,
    }
    return CampaignManifest(**(values | changes))


def _speed(names: dict[str, Any], flops: float) -> dict[str, Any]:
    times = {"prefill_ms_median": 100 * flops + 8, "decode_ms_per_token_median": 2.0, "latency_ms_median": 150.0}
    return (
        names | times | {"n": 50, "samples_per_second": 60.0, "t": 12.0, "v": 36.0, "flops_ratio": flops, "replicas": 1}
    )


def _comparison(name: str, value: float) -> dict[str, Any]:
    names = {"model": "org/m", "task": "shapes", "metric": "exact_match", "plan": name, "against": "full"}
    change = value - 0.9
    interval = {"difference": change, "ci_low": change - 0.05, "ci_high": change + 0.05}
    return names | interval | {"n": 50, "value": value, "against_value": 0.9, "share_changed": 0.1}


def _lost(names: dict[str, Any], place: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["answers"].names)
    return row | names | {"sample_id": f"s{place}", "scores": [], "error": "the prompt is too long"}
