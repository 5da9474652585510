"""Speed of this project against the baseline, in one run: `python jobs/bench.py sweep`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import bundled, option, run

if TYPE_CHECKING:
    from shortv.sweep.bench import BenchRow


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
