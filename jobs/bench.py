"""Benchmarks, each in one command: sweep, prefill, training, sizing, campaign, scheduling, gpu; and sizing tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import bundled, option, run


def positive(name: str, default: int | None, help_text: str = "", *, least: int = 1) -> Callable[[Any], Any]:
    """An option for a whole number of at least `least`."""
    return option(
        name, default=default, show_default=default is not None, type=click.IntRange(least), help=help_text or None
    )


shape_option = option("--shape", default="llava-1.5-7b", show_default=True, help="A published model's sizes.")
dtype_option = option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"])
)
device_option = option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")


@click.group()
def bench() -> None:
    """Measure ratios against a baseline; models of published sizes have random weights."""


@bench.command()
@option("--model", default=lambda: bundled("model"), help="Hub id or folder.  [default: the bundled model]")
@option("--calibration", default=lambda: bundled("calibration.parquet"), help="Parquet file.  [default: the bundled]")
@positive("--limit", 64, "Samples to sweep.")
@positive("--batch-size", 8, "Batch size of this engine.")
@positive("--repeats", 5, "Interleaved rounds; medians count.")
@dtype_option
@device_option
def sweep(model: str, calibration: str, limit: int, batch_size: int, repeats: int, dtype: str, device: str) -> int:
    """Sweep freeze-visual with this engine and with the released algorithm (one full forward per layer)."""
    from reports.calibration import read_calibration
    from shortv.bench.sweep import bench_sweep, sweep_text
    from shortv.families import load, quiet_transformers

    quiet_transformers()
    samples = read_calibration(calibration)[:limit]
    loaded = load(model, dtype=dtype, device=device)  # type: ignore[arg-type]
    rows = bench_sweep(loaded, samples, batch_size=batch_size, repeats=repeats)
    click.echo(f"{len(samples)} samples, {loaded.architecture.num_layers} layers, {dtype} on {device}, freeze-visual")
    click.echo(sweep_text(rows))
    return 0


@bench.command()
@shape_option
@positive("--layers", None, "Cut the depth, to fit a small machine.  [default: all]", least=2)
@positive("--frozen", None, "Frozen layers, the last ones.  [default: the paper's share]")
@positive("--batch-size", 1)
@positive("--text-tokens", 64, least=2)
@positive("--visual-tokens", None, "[default: the shape's]")
@option("--vision-tower", is_flag=True, help="Time the vision tower too, and print the ratio with it.")
@positive("--pairs", 7, "Interleaved pairs; medians count.")
@dtype_option
@device_option
def prefill(dtype: str, device: str, batch_size: int, **sizes: Any) -> int:
    """Prefill of a published model's sizes: full, fast and reference, against FLOPs and the roofline."""
    from shortv.bench.prefill import PrefillCase, bench_case, prefill_text

    case = PrefillCase(batch=batch_size, **{name: value for name, value in sizes.items() if value is not None})
    result = bench_case(case, dtype=dtype, device=device)
    click.echo(f"{case.shown}, {dtype} on {device}\n{prefill_text(result)}")
    return 0


@bench.command()
@option("--shape", default="tinyllama-1.1b", show_default=True, help="A published model's sizes.")
@positive("--layers", 4, "Depth of the model.", least=2)
@positive("--batch-size", 2)
@positive("--text-tokens", 64)
@positive("--visual-tokens", 576)
@positive("--stack", None, "Ablations that run together.  [default: the engine's choice]")
@positive("--repeats", 2, "Sweeps; the fastest counts.")
@dtype_option
@device_option
def sizing(batch_size: int, **sizes: Any) -> int:
    """Memory and time of a sweep by the default modes, against the predictions behind docs/cluster.md."""
    from shortv.bench.sizing import Case, bench_sizing, sizing_text

    case = Case(batch=batch_size, **sizes)
    click.echo(sizing_text(bench_sizing(case), case))
    return 0


@bench.command()
@shape_option
@positive("--layers", 2, "Depth of the model.")
@positive("--batch-size", 1)
@positive("--text-tokens", 64, "16 of them are trained.", least=18)
@positive("--pairs", 5, "Interleaved pairs; medians count.")
@dtype_option
@device_option
def training(batch_size: int, **sizes: Any) -> int:
    """A SAISA training step against a step of the dense model: forward and backward, without the vision tower."""
    from shortv.bench.training import Case, bench_training, training_text

    case = Case(batch=batch_size, **sizes)
    click.echo(training_text(bench_training(case), case))
    return 0


@bench.command()
@option("--limit", default=500, show_default=True, type=click.IntRange(1, 1000), help="Documents per plan.")
@option("--seconds", default=120.0, show_default=True, type=click.FloatRange(1), help="Length of the overload.")
@option("--part", "parts", multiple=True, type=click.Choice(["speed", "load", "scores"]), help="[default: all]")
def campaign(limit: int, seconds: float, parts: Sequence[str]) -> int:
    """The bundled model: a campaign against lmms-eval, an endpoint under overload, and scores by every interface."""
    from rich.console import Console

    from shortv.bench.campaign import bench_load, bench_scores, bench_speed, load_text, scores_text, speed_text

    chosen = parts or ("speed", "load", "scores")
    if "speed" in chosen:
        click.echo(speed_text(bench_speed(limit, Console()), limit))
    if "load" in chosen:
        click.echo(load_text(bench_load(seconds)))
    if "scores" in chosen:
        click.echo(scores_text(bench_scores(limit)))
    return 0


@bench.command()
@option("--workers", default="1,2,4,8,16", show_default=True, help="Numbers of workers, one sweep each.")
@positive("--units", 20, "Units per worker.")
@option("--unit-seconds", default=1.0, show_default=True, type=click.FloatRange(0.01), help="Length of a unit.")
def scheduling(workers: str, units: int, unit_seconds: float) -> int:
    """Overhead of distributing units: sweeps by workers with GPUs in name only, whose units sleep."""
    from shortv.bench.scheduling import bench_scheduling
    from shortv.errors import Refused

    if not all(part.strip().isdecimal() and int(part) for part in workers.split(",")):
        raise Refused(f"--workers is {workers!r}; give numbers such as 1,2,4")
    click.echo(f"{'workers':>8}{'units':>7}{'seconds':>9}{'of ideal':>10}   (units of {unit_seconds:g} s)")
    for count in map(int, workers.split(",")):
        found = bench_scheduling(bundled("model"), count, units_each=units, unit_seconds=unit_seconds)
        click.echo(f"{found.workers:>8}{found.units:>7}{found.seconds:>9.1f}{found.efficiency:>10.1%}")
    return 0


@bench.command()
def tables() -> int:
    """Print the tables of docs/cluster.md: computed GPU memory and time per published model."""
    from shortv.bench.tables import endpoint_table, sweep_table

    click.echo(f"{sweep_table()}\n\n{endpoint_table()}")
    return 0


@bench.command()
@option("--output-path", default="runs/bench-gpu", show_default=True, help="Folder for results.md and results.json.")
@option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
def gpu(output_path: str, device: str) -> int:
    """Run every GPU benchmark in bfloat16 and write one table; exit status 3 when some of them failed."""
    from shortv.bench.gpu import CASES, bench_gpu, write_results

    rows = bench_gpu(CASES, device=device, report=click.echo)
    for file in write_results(rows, Path(output_path), device=device):
        click.echo(f"written to {file}")
    return 3 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    run(bench)
