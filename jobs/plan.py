"""Make a plan from a sweep folder.

    python jobs/plan.py runs/demo --layers 5
    python jobs/plan.py runs/demo --flops-ratio 0.55 --mode no-visual-queries
    python jobs/plan.py runs/demo --max-lc 0.003 --mode drop-visual
    python jobs/plan.py runs/demo --layers 5 --random 0

Exit status: 0 the plan is there, 1 it could not be written, 2 refused.
"""

import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.common import option, run
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.plan import PLAN_FILE, Mode, Plan, parse_mode
from shortv.records import KlDirection
from shortv.sweep.planning import Choice, Control, Request, choose_layers
from shortv.sweep.ranking import set_stability
from shortv.workers.run import check_output
from shortv.workers.sweep_result import SweepResult, make_plan, read_sweep

SWEPT_MODES = [mode.value for mode in Mode if mode is not Mode.FULL]


@click.command(help="Make a plan from the results of a sweep.")
@click.argument("sweep_folder")
@option("--layers", type=int, help="Replace this many layers.  [default: 0.6 of them]")
@option("--flops-ratio", type=float, help="Replace the fewest layers that get the FLOPs down to this share.")
@option("--max-lc", type=float, help="Replace the layers whose LC, in nats, is at most this.")
@option("--mode", type=click.Choice(SWEPT_MODES), default=Mode.FREEZE_VISUAL.value, show_default=True)
@option("--random", "random_seed", type=int, metavar="SEED", help="Control: layers drawn with this seed.")
@option("--first", is_flag=True, help="Control: the first layers.")
@option("--last", is_flag=True, help="Control: the last layers.")
@option("--name", help="Name of the plan.  [default: mode and number of layers]")
@option("--output", "--output-path", "--output_path", help="Plan file.  [default: SWEEP_FOLDER/plans/NAME.json]")
@option(
    "--kl-direction",
    type=click.Choice([direction.value for direction in KlDirection]),
    help="Rank by this.  [default: the sweep's]",
)
def make(
    sweep_folder: str,
    mode: str,
    random_seed: int | None,
    first: bool,
    last: bool,
    name: str | None,
    output: str | None,
    kl_direction: str | None,
    **count: Any,
) -> int:
    """Parse the request, choose the layers, write the plan; ShortVError tells what went wrong."""
    _only_one(**count)
    _only_one(random=random_seed, first=first, last=last)
    controls = {Control.RANDOM: random_seed is not None, Control.FIRST: first, Control.LAST: last}
    control = next((control for control, given in controls.items() if given), None)
    request = Request(control=control, control_seed=random_seed or 0, **count)
    check_output(output or sweep_folder, "--output" if output else "SWEEP_FOLDER")
    folder = Folder(sweep_folder)
    try:
        result = read_sweep(folder, parse_mode(mode), KlDirection(kl_direction) if kl_direction else None)
    except ShortVError as error:
        # No work has started: a folder that cannot be read is refused, whatever the reason.
        raise Refused(str(error)) from error
    choice = choose_layers(result.evidence, request)
    plan = make_plan(result, request, choice, name)
    outcome = write_once(plan, *_place(folder, plan, output))
    click.echo(f"{describe(plan, result, request, choice)}\n{outcome}")
    return 0


def describe(plan: Plan, result: SweepResult, request: Request, choice: Choice) -> str:
    """Return what a user wants to know of a plan: its layers, its price, how sure the choice is."""
    evidence = result.evidence
    lines = [
        f"{plan.name}: {evidence.mode} in {len(choice.layers)} of {plan.num_layers} layers, "
        f"the first to replace first: {', '.join(map(str, choice.layers))}",
        f"FLOPs ratio: {plan.flops_ratio:.4f} at {evidence.t:.1f} text and {evidence.v:.1f} visual tokens "
        f"(means of {len(result.kl_SL)} samples)",
    ]
    if request.control or evidence.mode is Mode.DROP_VISUAL:
        return "\n".join([*lines, "stability: the layers follow from their number, not from a ranking by LC"])
    stability = set_stability(
        result.kl_SL, len(choice.layers), noise_floor=result.noise_floor, seed=result.manifest.seed
    )
    shares = [f"{same:.0%} with {share:.0%} of the samples" for share, same in stability.items()]
    return "\n".join([*lines, f"stability: bootstrap resamples choose the same layers in {', '.join(shares)}"])


def write_once(plan: Plan, folder: Folder, file: str) -> str:
    """Write the plan unless it is there already, and return what happened; refuses to replace another one."""
    shown = f"{folder.shown}/{file}"
    if not folder.exists(file):
        folder.write_bytes(file, plan.to_json().encode())
        return f"written to {shown}"
    try:
        same = Plan.from_json(folder.read_bytes(file)) == plan
    except Refused:
        same = False
    if not same:
        raise Refused(f"{shown} holds something else than this plan; give another --name or --output")
    return f"{shown} holds this plan already; nothing to do"


def _place(sweep: Folder, plan: Plan, output: str | None) -> tuple[Folder, str]:
    if output is None:
        return sweep, f"plans/{plan.name}.json"
    if output.endswith("/") or Path(output).is_dir():
        return Folder(output), PLAN_FILE
    parent, slash, file = output.rpartition("/")
    return Folder(parent + slash or "."), file


def _only_one(**given: object) -> None:
    names = ["--" + name.replace("_", "-") for name, value in given.items() if value is not None and value is not False]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other; give one of them")


if __name__ == "__main__":
    run(make)
