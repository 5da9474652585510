"""Serve a model and its plans as an OpenAI-style endpoint, all plans from one copy of the weights per replica.

    python jobs/serve.py --plan runs/demo/plans/freeze-visual-5.json
    python jobs/serve.py --model llava-hf/llava-1.5-7b-hf --plan llava-1.5-7b --replicas 1:4 --api-key-file keys.txt

Clients choose the plan by the model's name: MODEL is the full model, MODEL@PLAN the accelerated one.

Exit status: 0 stopped by a signal, 1 failed while working, 2 refused before work started.
"""

import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import bundled, option, options_of, run
from shortv.spec import load_spec
from shortv.workers.serving.spec import BUNDLED_NAME, EndpointSpec


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@options_of(EndpointSpec)
@option("--host", help="Address to bind to. [default: 127.0.0.1 without --api-key-file, 0.0.0.0 with it]")
@option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
def main(host: str | None, port: int, **flags: Any) -> int:
    if not flags["model"]:
        flags |= {"model": bundled("model"), "served_model_name": flags["served_model_name"] or BUNDLED_NAME}
    spec = load_spec(EndpointSpec, flags=flags)
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.terminal import console
    from shortv.workers.serving.run import run_endpoint

    return run_endpoint(spec, host=host, port=port, console=console())


if __name__ == "__main__":
    run(main)
