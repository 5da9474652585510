"""Measure the Layer Contribution of every decoder layer of a multimodal LLM, and rank the layers.

    python jobs/lc_sweep.py --output-path runs/demo
    python jobs/lc_sweep.py --model llava-hf/llava-1.5-7b-hf --calibration gqa:20 --calibration flickr30k_test:20 \\
        --workers 4 --dtype bfloat16 --output-path /data/llava-lc
    ray job submit --working-dir . -- python jobs/lc_sweep.py ... --output-path /shared/llava-lc
    ray job submit --submission-id $(python jobs/lc_sweep.py ... --print-submission-id) ...

The same command on the same folder continues a sweep that was stopped, and repeats the result of a finished one.
Exit status: 0 complete, 1 failed while working, 2 refused before work started, 3 finished but some samples failed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps in a Ray working directory where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from jobs.common import bundled, option, options_of, run
from shortv.errors import Refused
from shortv.spec import load_spec, read_chat_template
from shortv.workers.sweep.spec import SweepSpec, sweep_submission_id


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@options_of(SweepSpec)
@option("--print-submission-id", is_flag=True, help="Print an id for ray job submit, new for each attempt, and end.")
def main(print_submission_id: bool, **flags: Any) -> int:
    if flags["model"] and not flags["calibration"]:
        raise Refused(f"no calibration samples for {flags['model']}; give --calibration FILE.parquet or TASK:NUMBER")
    defaults = {"model": bundled("model"), "calibration": (bundled("calibration.parquet"),)}
    flags["chat_template"] = read_chat_template(flags["chat_template"])
    spec = load_spec(SweepSpec, flags=flags, defaults=defaults)
    if print_submission_id:
        click.echo(sweep_submission_id(spec))
        return 0
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.workers.sweep.driver import run_sweep

    return run_sweep(spec)


if __name__ == "__main__":
    run(main)
