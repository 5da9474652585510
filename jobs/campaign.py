"""Evaluate plans: models x plans x lmms-eval tasks, with scores and speed compared with the full model.

    python jobs/campaign.py --config shortv/tiny/campaign.toml
    python jobs/campaign.py --plans sweep:runs/demo@5,random:0..4@5 --tasks shapes_vqa --output-path runs/campaign
    python jobs/campaign.py --config recipe.toml --retry-failed
    python jobs/campaign.py --power 0.01 --output-path runs/campaign
    ray job submit --working-dir . -- python jobs/campaign.py ... --output-path /shared/campaign

A recipe is a TOML file with the settings below, with underscores instead of hyphens; flags override it. A plan is a
file (a pattern with * names several), a published plan's name, sweep:FOLDER@LAYERS, sweep:FOLDER@0.55 (a FLOPs ratio),
all (layers), exit@LAYERS (no visual tokens after the first LAYERS), or a control: random:SEED@LAYERS,
random:0..4@LAYERS, first@LAYERS, last@LAYERS, downsample@0.55 (smaller images at a FLOPs ratio). LAYERS may be a range,
4..8. The mode is freeze-visual unless /MODE follows all, a sweep, random, first or last. last@LAYERS/drop-visual, an
exit at a fixed layer, is not a control. The full model is always evaluated.

The same command on the same folder continues a campaign that was stopped, and prints the result of a finished one
again. With a changed recipe, only the cells that are missing run.
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
from reports.store import Folder
from shortv.spec import load_spec
from shortv.terminal import console
from shortv.workers.campaign.spec import CampaignSpec


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@option("--config", help="Recipe, a TOML file.")
@options_of(CampaignSpec)
@option(
    "--power",
    type=click.FloatRange(min=0, min_open=True),
    help="Print how many questions show a loss of this size, from what is in the output folder, and end.",
)
@option("--print-submission-id", is_flag=True, help="Print an id for ray job submit, new for each attempt, and end.")
def main(config: str | None, power: float | None, print_submission_id: bool, **flags: Any) -> int:
    spec = load_spec(CampaignSpec, flags=flags, config=config, defaults={"models": [bundled("model")]})
    if print_submission_id:
        from shortv.workers.campaign.spec import campaign_submission_id

        click.echo(campaign_submission_id(spec))
        return 0
    if power is not None:
        from reports.power import print_power
        from shortv.workers.run import check_output

        check_output(spec.output_path)
        print_power(Folder(spec.output_path), power, console())
        return 0

    # Torch and Ray take seconds to import, and --help needs neither.
    from shortv.workers.campaign.driver import run_campaign
    from shortv.workers.campaign.workers import CampaignWorkers

    return run_campaign(spec, workers=CampaignWorkers())


if __name__ == "__main__":
    run(main)
