"""Speed of this project against the baseline, in one run: sweep, prefill, training, sizing, campaign or scheduling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import bundled, option, run

if TYPE_CHECKING:
    from shortv.layers.bench import Prefill, Workload
    from shortv.sweep.bench import BenchRow
    from shortv.workers.bench.campaign import LoadResult, SpeedResult
    from shortv.workers.bench.sizing import Case, Sizing


@click.group()
def bench() -> None:
    """Measure ratios against the baseline; nothing is written."""


@bench.command()
@option("--model", default=lambda: bundled("model"), help="Hub id or folder.  [default: the bundled model]")
@option("--calibration", default=lambda: bundled("calibration.parquet"), help="Parquet file.  [default: the bundled]")
@option("--limit", default=64, show_default=True, type=click.IntRange(1), help="Samples to sweep.")
@option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Batch size of this engine.")
@option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds; medians count.")
@option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def sweep(model: str, calibration: str, limit: int, batch_size: int, repeats: int, dtype: str, device: str) -> int:
    """Sweep freeze-visual with this engine and with the released algorithm (one full forward per layer)."""
    from reports.calibration import read_calibration
    from shortv.families import load, quiet_transformers
    from shortv.sweep.bench import bench_sweep

    quiet_transformers()
    samples = read_calibration(calibration)[:limit]
    loaded = load(model, dtype=dtype, device=device)  # type: ignore[arg-type]
    rows = bench_sweep(loaded, samples, batch_size=batch_size, repeats=repeats)
    click.echo(f"{len(samples)} samples, {loaded.architecture.num_layers} layers, {dtype} on {device}, freeze-visual")
    _print(rows)
    return 0


@bench.command()
@option("--shape", default="llava-1.5-7b", show_default=True, help="A real model's sizes, with random weights.")
@option("--layers", type=click.IntRange(2), help="Cut the depth, to fit a small machine.  [default: all]")
@option("--frozen", type=click.IntRange(1), help="Frozen layers, the last ones.  [default: the paper's share]")
@option("--batch-size", default=1, show_default=True, type=click.IntRange(1))
@option("--text-tokens", default=64, show_default=True, type=click.IntRange(2))
@option("--visual-tokens", type=click.IntRange(1), help="[default: the shape's]")
@option("--vision-tower", is_flag=True, help="Time it too, and give the ratio with it.")
@option("--pairs", default=7, show_default=True, type=click.IntRange(1), help="Interleaved pairs; medians count.")
@option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def prefill(
    shape: str,
    layers: int | None,
    frozen: int | None,
    batch_size: int,
    text_tokens: int,
    visual_tokens: int | None,
    vision_tower: bool,
    pairs: int,
    dtype: str,
    device: str,
) -> int:
    """Prefill of a real shape: full, fast and reference, against FLOPs and the roofline."""
    import torch

    from shortv.errors import Refused
    from shortv.layers.bench import Workload, bench_prefill
    from shortv.layers.shapes import SHAPES, random_shape
    from shortv.plan import Mode

    if shape not in SHAPES:
        raise Refused(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    known = SHAPES[shape]
    depth = layers or known.num_layers
    count = frozen or max(1, round(depth * known.frozen / known.num_layers))
    if depth > known.num_layers or count > depth:
        raise Refused(f"{count} frozen of {depth} layers cannot be: {shape} has {known.num_layers}")
    model = random_shape(shape, layers=depth, dtype=getattr(torch, dtype), device=torch.device(device))
    modes = (Mode.FULL,) * (depth - count) + (Mode.FREEZE_VISUAL,) * count
    work = Workload(batch=batch_size, text_tokens=text_tokens, visual_tokens=visual_tokens or known.visual_tokens)
    pixels = known.pixels(work.batch, work.visual_tokens) if vision_tower else None
    result = bench_prefill(model, modes, work, pairs=pairs, pixels=pixels)
    _print_prefill(result, shape, depth, count, work, f"{dtype} on {device}")
    return 0


@bench.command()
@option("--shape", default="tinyllama-1.1b", show_default=True, help="A real model's sizes, with random weights.")
@option("--layers", default=4, show_default=True, type=click.IntRange(2), help="Its depth here.")
@option("--batch-size", default=2, show_default=True, type=click.IntRange(1))
@option("--text-tokens", default=64, show_default=True, type=click.IntRange(2))
@option("--visual-tokens", default=576, show_default=True, type=click.IntRange(1))
@option("--stack", type=click.IntRange(1), help="Ablations that run together.  [default: the engine's choice]")
@option("--repeats", default=2, show_default=True, type=click.IntRange(1), help="Sweeps; the fastest counts.")
@option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def sizing(shape: str, **sizes: Any) -> int:
    """Memory and time of a sweep by the default modes, against what cluster/README.md reckons with."""
    from shortv.errors import Refused
    from shortv.workers.bench.sizing import BUILDS, Case, bench_sizing

    if shape not in BUILDS:
        raise Refused(f"unknown shape {shape!r}; the shapes are {', '.join(BUILDS)}")
    case = Case(shape=shape, batch=sizes.pop("batch_size"), **sizes)
    _print_sizing(bench_sizing(case), case)
    return 0


@bench.command()
@option("--shape", default="llava-1.5-7b", show_default=True, help="A real model's sizes, with random weights.")
@option("--layers", default=2, show_default=True, type=click.IntRange(1), help="Its depth here.")
@option("--batch-size", "batch", default=1, show_default=True, type=click.IntRange(1))
@option("--text-tokens", default=64, show_default=True, type=click.IntRange(18), help="16 of them are learned from.")
@option("--pairs", default=5, show_default=True, type=click.IntRange(1), help="Interleaved pairs; medians count.")
@option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def training(shape: str, dtype: str, device: str, **sizes: int) -> int:
    """A training step of SAISA against one of the dense model: forward and backward, without the vision tower."""
    import torch

    from shortv.errors import Refused
    from shortv.workers.bench.training import SIZES, VISUAL_TOKENS, bench_training

    if shape not in SIZES:
        raise Refused(f"unknown shape {shape!r}; the shapes are {', '.join(SIZES)}")
    found = bench_training(shape, **sizes, dtype=getattr(torch, dtype), device=torch.device(device))
    click.echo(
        f"{shape}, {sizes['layers']} layers, batch {sizes['batch']}, t = {sizes['text_tokens']}, "
        f"v = {VISUAL_TOKENS}, {dtype} on {device}\n"
        f"{'forward and backward':28}{'dense, ms':>12}{'SAISA, ms':>12}{'of dense':>10}"
    )
    for stage, cost in {"projectors": found.projectors, "projectors, language model": found.joint}.items():
        click.echo(f"{stage:28}{1e3 * cost.dense:>12.1f}{1e3 * cost.saisa:>12.1f}{cost.ratio:>10.3f}")
    click.echo(f"{'FLOPs of a prefill':28}{'':24}{found.flops_ratio:>10.3f}")
    return 0


@bench.command()
@option("--limit", default=500, show_default=True, type=click.IntRange(1, 1000), help="Questions per plan.")
@option("--seconds", default=120.0, show_default=True, type=click.FloatRange(1), help="Length of the overload.")
@option("--part", "parts", multiple=True, type=click.Choice(["speed", "load", "scores"]), help="[default: all]")
def campaign(limit: int, seconds: float, parts: Sequence[str]) -> int:
    """The bundled model: a campaign against lmms-eval, an endpoint under overload, scores by way of asking."""
    from rich.console import Console

    from shortv.workers.bench.campaign import bench_load, bench_scores, bench_speed

    asked = parts or ("speed", "load", "scores")
    if "speed" in asked:
        _print_speed(bench_speed(limit, Console()), limit)
    if "load" in asked:
        _print_load(bench_load(seconds))
    if "scores" in asked:
        found = bench_scores(limit)
        for way, scores in found.items():
            click.echo(f"{way:28}{scores['exact_match,none']:.4f}")
        same = all(scores == next(iter(found.values())) for scores in found.values())
        click.echo(f"all metrics of all ways are {'equal' if same else 'NOT equal'}")
    return 0


@bench.command()
@option("--workers", default="1,2,4,8,16", show_default=True, help="Numbers of workers, one sweep each.")
@option("--units", default=20, show_default=True, type=click.IntRange(1), help="Units per worker.")
@option("--unit-seconds", default=1.0, show_default=True, type=click.FloatRange(0.01), help="Length of a unit.")
def scheduling(workers: str, units: int, unit_seconds: float) -> int:
    """Sweeps by workers with GPUs in name only, whose units sleep: what handing out units costs."""
    from shortv.errors import Refused
    from shortv.workers.bench.scheduling import bench_scheduling

    if not all(part.strip().isdecimal() and int(part) for part in workers.split(",")):
        raise Refused(f"--workers is {workers!r}; give numbers such as 1,2,4")
    click.echo(f"{'workers':>8}{'units':>7}{'seconds':>9}{'of ideal':>10}   (units of {unit_seconds:g} s)")
    for count in map(int, workers.split(",")):
        found = bench_scheduling(bundled("model"), count, units_each=units, unit_seconds=unit_seconds)
        click.echo(f"{found.workers:>8}{found.units:>7}{found.seconds:>9.1f}{found.efficiency:>10.1%}")
    return 0


def _print_speed(result: SpeedResult, limit: int) -> None:
    lmms, startup = sum(run.seconds for run in result.lmms), sum(run.startup for run in result.lmms)
    campaign = f"one campaign, {result.replicas} replicas"
    click.echo(
        f"six plans x {limit} questions\n"
        f"{'':28}{'seconds':>9}{'start-up':>10}\n"
        f"{'six lmms_eval runs, batch 1':28}{lmms:>9.1f}{startup:>10.1f}\n"
        f"{campaign:28}{result.campaign_seconds:>9.1f}{result.campaign_startup:>10.1f}\n"
        f"{result.ratio:.2f} times faster, {result.ratio_with_startup:.2f} with start-up; scores are "
        f"{'equal' if result.same_scores else 'NOT equal'}"
    )


def _print_load(result: LoadResult) -> None:
    capacity, over = result.capacity, result.overload
    click.echo(
        f"capacity (closed loop): {capacity.goodput:.1f} answers/s, median {1e3 * capacity.median:.0f} ms\n"
        f"overload (open loop): {over.sent} requests at {result.rate:.1f}/s for {over.seconds:.0f} s: "
        f"{over.answered} answered, {over.refused} refused with 429 or 503 ({over.bare_refusals} without Retry-After), "
        f"{over.sent - over.answered - over.refused - over.silent} other, {over.silent} without an answer\n"
        f"goodput {over.goodput:.1f} answers/s, {over.goodput / capacity.goodput:.0%} of the capacity; "
        f"median {1e3 * over.median:.0f} ms, p99 {1e3 * over.p99:.0f} ms\n"
        f"the client's own cost: {1e3 * over.client_cpu / over.sent:.2f} ms of CPU per request, "
        f"{over.client_cpu / over.seconds:.0%} of a core; at most {1e3 * over.lag:.0f} ms late"
    )


def _print_prefill(result: Prefill, shape: str, depth: int, count: int, work: Workload, where: str) -> None:
    click.echo(
        f"{shape}, {depth} layers, {count} frozen, batch {work.batch}, t = {work.text_tokens}, "
        f"v = {work.visual_tokens}, {where}"
    )
    click.echo(
        f"measured limits: {result.device.flops / 1e9:.0f} GFLOP/s, {result.device.bandwidth / 1e9:.1f} GB/s\n"
        f"{'':12}{'ms':>10}{'of full':>10}\n"
        f"{'full':12}{1e3 * result.full:>10.1f}{1:>10.3f}\n"
        f"{'fast':12}{1e3 * result.fast:>10.1f}{result.fast_ratio:>10.3f}\n"
        f"{'reference':12}{1e3 * result.reference:>10.1f}{result.reference / result.full:>10.3f}\n"
        f"{'roofline':12}{'':>10}{result.roofline_ratio:>10.3f}\n"
        f"{'FLOPs':12}{'':>10}{result.flops_ratio:>10.3f}\n"
        f"speed-up {1 / result.fast_ratio:.2f}, {result.roofline_ratio / result.fast_ratio:.0%} of the roofline's "
        f"{1 / result.roofline_ratio:.2f}; a frozen layer takes {result.layer_ratio:.3f} of a full one"
    )
    if result.tower:
        click.echo(f"vision tower {1e3 * result.tower:.1f} ms; with it fast takes {result.tower_ratio:.3f} of full")
    if result.peak_full:
        click.echo(f"peak memory {result.peak_full / 2**30:.2f} GiB full, {result.peak_fast / 2**30:.2f} GiB fast")


def _print_sizing(result: Sizing, case: Case) -> None:
    """Weights were counted after loading, the rest is the sweep's peak on top of them."""
    memory, gib = result.memory, 2**30
    rows = {
        "weights, GiB": (memory.weights / gib, result.weights / gib),
        "work of the sweep, GiB": ((memory.total - memory.weights) / gib, result.work / gib),
        "in all, GiB": (memory.total / gib, (result.weights + result.work) / gib),
        "seconds": (result.predicted_seconds, result.seconds),
    }
    click.echo(
        f"{case.shape}, {case.layers} layers, batch {case.batch}, t = {case.text_tokens}, v = {case.visual_tokens}, "
        f"{case.dtype} on {case.device}\n"
        f"stacked ablations: {memory.stack} predicted, {result.stack} run; {result.flops / 1e12:.2f} TFLOP "
        f"at the measured {result.rate / 1e9:.0f} GFLOP/s\n"
        f"{'':24}{'predicted':>11}{'measured':>11}{'of predicted':>14}"
    )
    for name, (predicted, measured) in rows.items():
        click.echo(f"{name:24}{predicted:>11.3f}{measured:>11.3f}{measured / predicted:>14.2f}")


def _print(rows: Sequence[BenchRow]) -> None:
    """Ratios are against the released algorithm at batch 1 and at the same batch size."""
    released = {row.batch_size: row for row in rows if row.name == "released algorithm"}
    click.echo(f"{'':26}{'batch':>6}{'layer passes':>14}{'seconds':>9}{'x batch 1':>11}{'x same batch':>14}")
    for row in rows:
        alone, same = released[1].seconds / row.seconds, released[row.batch_size].seconds / row.seconds
        click.echo(
            f"{row.name:26}{row.batch_size:>6}{row.layer_passes:>14}{row.seconds:>9.2f}{alone:>11.2f}{same:>14.2f}"
        )


if __name__ == "__main__":
    run(bench)
