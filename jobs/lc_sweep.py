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

from jobs.common import bundled, option, run
from shortv.errors import Refused
from shortv.records import KlDirection
from shortv.spec import ModelSpec, read_chat_template, validate
from shortv.workers.request import DEFAULT_MODES, SweepRequest, parse_modes, parse_workers


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@option("--model", help="Hub id, or a folder with config.json and safetensors. [default: the bundled model]")
@option("--revision", help="Branch, tag or commit on the hub.")
@option(
    "--calibration",
    multiple=True,
    help="FILE.parquet or an lmms-eval TASK:NUMBER; may be repeated. [default, for the bundled model: its samples]",
)
@option("--output-path", required=True, help="Folder or URI (s3://...) for the results.")
@option("--limit", type=float, help="Samples per calibration source; below 1 a share of each file.")
@option("--include-path", help="Folder with your own lmms-eval tasks.")
@option("--modes", default=",".join(DEFAULT_MODES), show_default=True, help="Modes to measure, or all.")
@option(
    "--kl-direction",
    type=click.Choice([str(direction) for direction in KlDirection]),
    default=str(KlDirection.FULL_ABLATED),
    show_default=True,
    help="The direction that ranks; both are stored.",
)
@option("--batch-size", "-b", type=int, default=8, show_default=True, help="Samples per batch.")
@option("--seed", type=int, default=0, show_default=True, help="Of task samples and bootstrap resamples.")
@option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True)
@option("--attn-implementation", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@option("--chat-template", type=click.Path(), help="Jinja file, for a model without a chat template.")
@option("--workers", help="N or MIN:MAX. [default: one per free GPU, or one on CPUs]")
@option("--gpus-per-worker", type=float, default=1, show_default=True, help="Above 1 spreads the model over them.")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@option("--layers-per-unit", type=int, help="Layers that a worker ablates per unit. [default: by cost]")
@option("--stack", type=int, help="Ablations run together. [default: what fits]")
@option("--fail-on-error", type=float, default=0.0, show_default=True, help="Share of failed samples that counts as 0.")
@option("--print-submission-id", is_flag=True, help="Print an id for ray job submit, new for each attempt, and end.")
def main(
    model: str | None,
    revision: str | None,
    calibration: tuple[str, ...],
    output_path: str,
    limit: float | None,
    include_path: str | None,
    modes: str,
    kl_direction: str,
    batch_size: int,
    seed: int,
    dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    chat_template: str | None,
    workers: str | None,
    print_submission_id: bool,
    **how: Any,
) -> int:
    if not calibration:
        if model:
            raise Refused(f"no calibration samples for {model}; give --calibration FILE.parquet or TASK:NUMBER")
        calibration = (bundled("calibration.parquet"),)
    loading = {
        "name": model or bundled("model"),
        "revision": revision,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "chat_template": read_chat_template(chat_template),
    }
    spec = validate(ModelSpec, loading)
    request = SweepRequest(
        model=spec,
        calibration=calibration,
        output_path=output_path,
        modes=parse_modes(modes),
        kl_direction=KlDirection(kl_direction),
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        include_path=include_path,
        workers=parse_workers(workers) if workers else None,
        **how,
    )
    if print_submission_id:
        from shortv.workers.sweep import sweep_submission_id

        click.echo(sweep_submission_id(request))
        return 0
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.workers.sweep import run_sweep

    return run_sweep(request)


if __name__ == "__main__":
    run(main)
