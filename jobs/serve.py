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
from jobs.common import bundled, option, run
from shortv.workers.serving.arguments import BUNDLED_NAME, EndpointArguments


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@option(
    "--model", default="", help="Hub id, or a folder with config.json and safetensors. [default: the bundled model]"
)
@option("--revision", help="Branch, tag or commit on the hub.")
@option("--served-model-name", help="Name that clients use. [default: the hub id, or the folder's name]")
@option("--plan", "plans", multiple=True, help="Plan file, folder with shortv_plan.json or published name; repeatable.")
@option("--host", help="Address to bind to. [default: 127.0.0.1 without --api-key-file, 0.0.0.0 with it]")
@option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@option("--api-key-file", help="File with one accepted API key per line.")
@option("--reports", help="Folder or URI above sweeps and campaigns, whose pages and tables are served at /reports/.")
@option("--replicas", default="1", show_default=True, help="N, or MIN:MAX to follow the load.")
@option("--gpus-per-replica", type=float, default=1, show_default=True, help="Above 1 spreads the model over them.")
@option("--cpus-per-replica", type=float, help="[default: an even share, less one for everything else]")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True)
@option("--attn-implementation", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@option("--chat-template", type=click.Path(), help="Jinja file, for a model without a chat template.")
@option("--batch-size", "-b", type=int, default=16, show_default=True, help="Requests that run together per replica.")
@option("--max-queued", type=int, default=64, show_default=True, help="Requests that may wait in each replica.")
@option("--timeout", type=float, default=120.0, show_default=True, help="Seconds after which a request is given up.")
@option("--max-body-mb", type=float, default=20.0, show_default=True, help="Largest request body.")
@option("--max-images", type=int, default=16, show_default=True, help="Most images of a request.")
@option("--max-image-megapixels", type=float, default=64.0, show_default=True, help="Of a request's images together.")
def main(host: str | None, port: int, **arguments: Any) -> int:
    if not arguments["model"]:
        arguments |= {"model": bundled("model"), "served_model_name": arguments["served_model_name"] or BUNDLED_NAME}
    asked = EndpointArguments(**arguments)
    # Torch and Ray take seconds to import, and --help needs neither.
    from rich.console import Console

    from shortv.workers.serving.run import run_endpoint

    return run_endpoint(asked, host=host, port=port, console=Console())


if __name__ == "__main__":
    run(main)
