"""Benchmarks, each in one command; models of published sizes have random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import options_of, run
from shortv.bench.rows import write_results
from shortv.bench.specs import BENCHMARKS, Bench, run_benchmark
from shortv.spec import load_spec


@click.group()
def main() -> None:
    """Measure ratios against a baseline; models of published sizes have random weights."""


def _add(name: str, settings: type[Bench]) -> None:
    """Add the command of a benchmark, which prints its rows as they come."""

    @main.command(name, help=settings.__doc__)
    @options_of(settings)
    def measure(**flags: Any) -> int:
        spec = load_spec(settings, flags=flags)
        rows = []
        for row in run_benchmark(name, spec):
            rows.append(row)
            click.echo(str(row))
        if spec.output_path is not None:
            for file in write_results(rows, Path(spec.output_path), device=getattr(spec, "device", "cpu")):
                click.echo(f"written to {file}")
        return 3 if any(row.error for row in rows) else 0


for name, settings in BENCHMARKS.items():
    _add(name, settings)


@main.command()
def tables() -> int:
    """Print the tables of docs/cluster.md: computed GPU memory and time per published model."""
    from shortv.bench.tables import endpoint_table, sweep_table

    click.echo(f"{sweep_table()}\n\n{endpoint_table()}")
    return 0


if __name__ == "__main__":
    run(main)
