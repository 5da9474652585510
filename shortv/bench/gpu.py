"""Every benchmark for a GPU in one run and one table: prefill, sweep, sizing and training in bfloat16."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shortv.bench import prefill, sizing, training
from shortv.bench.models import MODELS
from shortv.bench.sweep import bench_sweep
from shortv.errors import Refused

TINY = Path(__file__).resolve().parents[1] / "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCase:
    """The bundled model and its calibration samples, in float32."""

    limit: int = 64
    batch_size: int = 8
    repeats: int = 5


Case = prefill.PrefillCase | sizing.Case | training.Case | SweepCase

CASES: tuple[Case, ...] = (
    *(
        prefill.PrefillCase(shape=name, batch=batch, vision_tower=True)
        for name, known in MODELS.items()
        if known.real_tower
        for batch in (1, 8)
    ),
    sizing.Case(shape="llava-1.5-7b", layers=32, batch=8, text_tokens=64, visual_tokens=576, repeats=2),
    training.Case(shape="llava-1.5-7b", layers=8, batch=8),
    SweepCase(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: milliseconds of the baseline and of this project, and `figures` that the benchmark adds."""

    benchmark: str
    case: str
    baseline_ms: float = 0.0
    measured_ms: float = 0.0
    ratio: float = 0.0
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""


def bench_gpu(cases: Sequence[Case], *, device: str, report: Callable[[str], object]) -> list[Row]:
    """Run all cases one after another; a case that fails becomes a row with its error.

    Raises Refused when the device is a GPU that this machine does not have.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(f"--device is {device}, but torch finds no CUDA device; run this on a machine with a GPU")
    rows: list[Row] = []
    for case in cases:
        try:
            found = list(_rows(case, device))
        except (RuntimeError, Refused) as error:
            found = [Row(benchmark=type(case).__module__, case=str(case), error=str(error).splitlines()[0])]
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        rows += found
        for row in found:
            report(_line(row))
    return rows


def write_results(rows: Sequence[Row], folder: Path, *, device: str) -> list[Path]:
    """Write the rows as results.md and results.json, with the device and the version of torch."""
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    where = {"device": name, "torch": torch.__version__}
    head = "| benchmark | case | baseline, ms | measured, ms | ratio | figures |\n| --- | --- | --- | --- | --- | --- |"
    table = "\n".join([f"Measured on {name} with torch {torch.__version__}.", "", head, *map(_line, rows), ""])
    listed = [dataclasses.asdict(row) for row in rows]
    markdown, data = folder / "results.md", folder / "results.json"
    markdown.write_text(table, "utf-8")
    data.write_text(json.dumps({**where, "rows": listed}, indent=2) + "\n", "utf-8")
    return [markdown, data]


def _line(row: Row) -> str:
    figures = row.error or ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    times = f"{row.baseline_ms:.1f} | {row.measured_ms:.1f} | {row.ratio:.3f}"
    return f"| {row.benchmark} | {row.case} | {times} | {figures} |"


def _rows(case: Case, device: str) -> Iterator[Row]:
    # float16 and bfloat16 are slow on CPUs, where this runs in tests only.
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if isinstance(case, prefill.PrefillCase):
        yield _prefill_row(case, dtype, device)
    elif isinstance(case, sizing.Case):
        yield _sizing_row(dataclasses.replace(case, dtype=dtype, device=device))
    elif isinstance(case, training.Case):
        yield from _training_rows(dataclasses.replace(case, dtype=dtype, device=device))
    else:
        yield from _sweep_rows(case, device)


def _prefill_row(case: prefill.PrefillCase, dtype: str, device: str) -> Row:
    found = prefill.bench_case(case, dtype=dtype, device=device)
    return Row(
        benchmark="prefill",
        case=case.shown,
        baseline_ms=1e3 * found.full,
        measured_ms=1e3 * found.fast,
        ratio=found.fast_ratio,
        figures={
            "reference_ms": 1e3 * found.reference,
            "flops_ratio": found.flops_ratio,
            "roofline_ratio": found.roofline_ratio,
            "frozen_layer_ratio": found.layer_ratio,
            "tower_ms": 1e3 * found.tower,
            "ratio_with_tower": found.tower_ratio,
            "peak_gib_full": found.peak_full / 2**30,
            "peak_gib_fast": found.peak_fast / 2**30,
        },
    )


def _sizing_row(case: sizing.Case) -> Row:
    found = sizing.bench_sizing(case)
    return Row(
        benchmark="sizing",
        case=f"{case.shape}, {case.layers} layers, batch {case.batch}; predicted against measured",
        baseline_ms=1e3 * found.predicted_seconds,
        measured_ms=1e3 * found.seconds,
        ratio=found.seconds / found.predicted_seconds,
        figures={
            "predicted_gib": found.memory.total / 2**30,
            "measured_gib": (found.weights + found.work) / 2**30,
            "stack": found.stack,
        },
    )


def _training_rows(case: training.Case) -> Iterator[Row]:
    found = training.bench_training(case)
    for stage, cost in {"projectors": found.projectors, "projectors and language model": found.joint}.items():
        yield Row(
            benchmark="training",
            case=f"{case.shape}, {case.layers} layers, batch {case.batch}, {stage}; SAISA against dense",
            baseline_ms=1e3 * cost.dense,
            measured_ms=1e3 * cost.saisa,
            ratio=cost.ratio,
            figures={"flops_ratio_of_a_prefill": found.flops_ratio},
        )


def _sweep_rows(case: SweepCase, device: str) -> Iterator[Row]:
    from reports.calibration import read_calibration
    from shortv.families import load

    samples = read_calibration(str(TINY / "calibration.parquet"))[: case.limit]
    loaded = load(str(TINY / "model"), dtype="float32", device=device)
    rows = bench_sweep(loaded, samples, batch_size=case.batch_size, repeats=case.repeats)
    released = {row.batch_size: row.seconds for row in rows if row.name == "released algorithm"}
    for row in rows:
        if row.name != "released algorithm":
            baseline = released[row.batch_size]
            yield Row(
                benchmark="sweep",
                case=f"bundled model, {row.name}, batch {row.batch_size}; against the released algorithm",
                baseline_ms=1e3 * baseline,
                measured_ms=1e3 * row.seconds,
                ratio=row.seconds / baseline,
                figures={"layer_passes": row.layer_passes},
            )
