"""Judge plans: models x plans x lmms-eval tasks, with the loss against the full model and the speed gained.

    python jobs/campaign.py --config shortv/tiny/campaign.toml
    python jobs/campaign.py --plans sweep:runs/demo@5,random:0..4@5 --tasks shapes_vqa --output-path runs/campaign
    python jobs/campaign.py --config recipe.toml --retry-failed
    ray job submit --working-dir . -- python jobs/campaign.py ... --output-path /shared/campaign

A recipe is a TOML file with the settings below, underscores for hyphens; flags go before it. A plan is a file (several
by *), a published plan's name, sweep:FOLDER@LAYERS, sweep:FOLDER@0.55 (a FLOPs ratio), all (layers), or a control:
random:SEED@LAYERS, random:0..4@LAYERS, first@LAYERS, last@LAYERS. /MODE after it names another mode than
freeze-visual; last@LAYERS/drop-visual, the exit at a fixed layer, is no control. The full model is always among the
plans.

The same command on the same folder continues a campaign that was stopped, and repeats the result of a finished one;
a changed recipe runs only the cells that are missing.
Exit status: 0 complete, 1 failed while working, 2 refused before work started, 3 finished but some samples failed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, perhaps in a Ray working directory where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from jobs.common import bundled, option, run


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@option("--config", help="Recipe, a TOML file.")
@option("--models", "--model", multiple=True, help="Hub id, or a folder. May be repeated. [default: the bundled one]")
@option("--revision", help="Branch, tag or commit on the hub.")
@option("--plans", "--plan", multiple=True, help="Plans, as above; may be repeated or separated by commas.")
@option("--tasks", "--task", multiple=True, help="lmms-eval tasks. [default: shapes_vqa, the bundled one]")
@option("--include-path", multiple=True, help="Folder with your own lmms-eval tasks.")
@option("--limit", help="Samples per task; below 1 a share. [default: all]")
@option("--seed", help="Of sampled answers and of the intervals. [default: 0]")
@option("--gen-kwargs", help="name=value,name=value in place of the task's.")
@option("--replicas", help="N or MIN:MAX. [default: one per free GPU, or one on CPUs]")
@option("--gpus-per-replica", help="Above 1 spreads the model over them. [default: 1]")
@option("--batch-size", "-b", help="Most questions that a replica answers together. [default: 16]")
@option("--num-concurrent", help="Questions asked at once. [default: as many as the replicas take]")
@option("--dtype", help="auto, float32, bfloat16 or float16. [default: auto]")
@option("--device", help="auto, cpu or cuda. [default: auto]")
@option("--attn-implementation", help="sdpa or eager. [default: sdpa]")
@option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@option("--output-path", help="Folder or URI (s3://...) for the results.")
@option("--fail-on-error", help="Share of a cell's samples whose failure counts as 0. [default: 0]")
@option("--retry-failed", is_flag=True, help="Run the cells again that failed or lack samples.")
@option("--print-submission-id", is_flag=True, help="Print an id for ray job submit, new for each attempt, and end.")
def main(config: str | None, print_submission_id: bool, **flags: Any) -> int:
    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.workers.campaign.recipe import read_recipe

    given = {name: value for name, value in flags.items() if value not in (None, (), False)}
    recipe = read_recipe(config, given, {"models": [bundled("model")]}, environment=os.environ)
    if print_submission_id:
        from shortv.workers.submission import campaign_submission_id

        click.echo(campaign_submission_id(recipe))
        return 0

    from shortv.workers.campaign.driver import run_campaign
    from shortv.workers.campaign.runner import ReplicaRunner

    return run_campaign(recipe, runner=ReplicaRunner())


if __name__ == "__main__":
    run(main)
